// The server's API from a page: answers as they come, errors as the server words them.

// Server-sent events out of bytes, wherever these were cut. Only `data` matters here.
export class EventReader {
  #decoder = new TextDecoder();
  #line = "";
  #data = [];
  #afterReturn = false;

  // The data of the events that are complete with these bytes.
  push(bytes) {
    const found = [];
    for (const character of this.#decoder.decode(bytes, { stream: true })) {
      const secondHalf = this.#afterReturn && character === "\n";
      this.#afterReturn = character === "\r";
      if (secondHalf) continue;
      if (character !== "\r" && character !== "\n") {
        this.#line += character;
        continue;
      }
      const line = this.#line;
      this.#line = "";
      if (line === "" && this.#data.length) {
        found.push(this.#data.join("\n"));
        this.#data = [];
      } else if (line.startsWith("data:")) {
        this.#data.push(line.slice(line[5] === " " ? 6 : 5));
      }
    }
    return found;
  }
}

export class ApiError extends Error {
  constructor(message, status = 0, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

function headers(key) {
  const all = { "Content-Type": "application/json" };
  if (key) all.Authorization = `Bearer ${key}`;
  return all;
}

async function reach(path, options) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached. Is it still running?");
  }
  if (answer.ok) return answer;
  let said = {};
  try {
    said = (await answer.json()).error ?? {};
  } catch { /* not JSON: something between here and the server */ }
  throw new ApiError(said.message ?? `The server answers ${answer.status}.`, answer.status, said.code ?? null);
}

export async function firstModel(key) {
  const answer = await reach("/v1/models", { headers: headers(key) });
  return (await answer.json()).data[0];
}

// The chunks of a streamed answer.
export async function* stream(path, body, key, signal) {
  const options = { method: "POST", headers: headers(key), signal,
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }) };
  const reader = (await reach(path, options)).body.getReader();
  const events = new EventReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) throw new ApiError("The connection ended in the middle of the answer.");
      for (const data of events.push(value)) {
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new ApiError(chunk.error.message, 0, chunk.error.code);
        yield chunk;
      }
    }
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") throw error;
    throw new ApiError("The connection broke in the middle of the answer.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
