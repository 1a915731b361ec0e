// The chat page: a conversation that lives in this tab, and what the reader can do with it.

import { ApiError, firstModel, stream } from "./api.js";
import { show } from "./markdown.js";

const at = (id) => document.getElementById(id);
const DEFAULTS = { system: "", temperature: 0.7, topP: 0.95, tokens: null };
const NEAR = 80; // pixels from the end within which the page follows an answer

const settings = { ...DEFAULTS, ...read(localStorage, "moai.settings", {}) };
let messages = read(sessionStorage, "moai.chat", []); // {role, content, facts?, trouble?}
let key = read(sessionStorage, "moai.key", "");
let model = null;
let running = null; // AbortController of the answer that grows
let following = true;

function read(store, name, otherwise) {
  try {
    return JSON.parse(store.getItem(name)) ?? otherwise;
  } catch {
    return otherwise; // blocked, or written by something else
  }
}

function write(store, name, value) {
  try {
    store.setItem(name, JSON.stringify(value));
  } catch { /* full or blocked: it lives on in this page */ }
}

// ---------------------------------------------------------------- the model

async function connect() {
  try {
    model = await firstModel(key);
  } catch (error) {
    state("off", error.message);
    if (error.status === 401) openSettings(key ? "The API key is wrong." : "This server asks for an API key.");
    else setTimeout(connect, 3000);
    return;
  }
  state("on", "connected");
  document.title = at("model").textContent = model.id;
  at("greeting").textContent = model.chat ? `Talk to ${model.id}` : `Write with ${model.id}`;
  at("facts").textContent = model.chat
    ? `It reads up to ${model.context.toLocaleString("en")} tokens. What you write goes to this server only.`
    : "This model has no chat template: it continues what you write.";
  at("starters").hidden = !model.chat;
  at("text").placeholder = model.chat ? `Message ${model.id}` : "Begin a text";
  document.querySelector(".chat-only").hidden = !model.chat;
}

function state(kind, title) {
  at("state").className = `state ${kind}`;
  at("state").title = title;
}

// ---------------------------------------------------------------- the conversation

function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

function button(name, title, action) {
  const made = document.createElement("button");
  made.type = "button";
  made.title = title;
  made.append(icon(name));
  made.addEventListener("click", () => action(made));
  return made;
}

function turn(message) {
  const article = document.createElement("article");
  article.className = `turn ${message.role}`;
  article.setAttribute("aria-label", message.role === "user" ? "You" : "Model");
  const said = document.createElement("div");
  said.className = "said";
  said.dir = "auto";
  article.append(said);
  if (message.role === "assistant") {
    const under = document.createElement("div");
    under.className = "under";
    article.append(under);
  }
  return article;
}

function fill(article, message) {
  const said = article.querySelector(".said");
  if (message.role === "user") {
    said.textContent = message.content;
    return;
  }
  show(said, message.content);
  article.querySelector(".trouble")?.remove();
  if (message.trouble) {
    const trouble = document.createElement("p");
    trouble.className = "trouble";
    trouble.setAttribute("role", "alert");
    trouble.textContent = message.trouble;
    article.insertBefore(trouble, article.querySelector(".under"));
  }
  const facts = document.createElement("span");
  facts.className = "facts-of";
  facts.textContent = message.facts ?? "";
  const under = article.querySelector(".under");
  under.replaceChildren();
  if (message.content) under.append(button("copy", "Copy the answer", (from) => copy(message.content, from)));
  if (message === messages.at(-1)) under.append(button("retry", "Answer again", again));
  under.append(facts);
}

function draw() {
  at("welcome").hidden = messages.length > 0;
  at("log").replaceChildren(...messages.map((message) => {
    const article = turn(message);
    fill(article, message);
    return article;
  }));
  toEnd();
}

function keep() {
  write(sessionStorage, "moai.chat", messages);
}

async function copy(text, from) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // no permission, or a page without https
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  const before = [...from.childNodes];
  from.replaceChildren(before[0].nodeName === "svg" ? icon("done") : "Copied");
  setTimeout(() => from.replaceChildren(...before), 1200);
}

// ---------------------------------------------------------------- answers

function ask(text) {
  messages.push({ role: "user", content: text });
  answer();
}

function again() {
  if (running) return;
  if (messages.at(-1)?.role === "assistant") messages.pop();
  answer();
}

function request(history) {
  const body = { model: model.id, temperature: settings.temperature, top_p: settings.topP };
  if (settings.tokens) body.max_tokens = Math.min(settings.tokens, model.max_new_tokens);
  if (!model.chat) {
    const prompt = history.map((message) => message.content).join("");
    return ["/v1/completions", { max_tokens: 128, ...body, prompt }];
  }
  const turns = history.filter((message) => message.content).map(({ role, content }) => ({ role, content }));
  if (settings.system.trim()) turns.unshift({ role: "system", content: settings.system });
  return ["/v1/chat/completions", { ...body, messages: turns }];
}

async function answer() {
  const history = messages.slice();
  const message = { role: "assistant", content: "" };
  messages.push(message);
  draw();
  const article = at("log").lastChild;
  article.classList.add("waiting");
  running = new AbortController();
  buttons();
  following = true;
  toEnd();
  let left = 0;
  try {
    for (;;) {
      try {
        await grow(message, article, request(history), running.signal);
        break;
      } catch (error) {
        // the oldest exchange makes room, as in the terminal
        if (error.code !== "context_length_exceeded" || message.content || history.length <= 2 || !model.chat) throw error;
        history.splice(0, 2);
        left += 2;
      }
    }
    if (left) message.facts += ` · the first ${left} messages were left out, to fit the model's context`;
  } catch (error) {
    if (error.name === "AbortError") message.facts = "stopped";
    else message.trouble = error instanceof ApiError ? error.message : `Something went wrong: ${error.message}`;
    if (error.status === 401) openSettings(key ? "The API key is wrong." : "This server asks for an API key.");
  }
  running = null;
  article.classList.remove("waiting");
  fill(article, message);
  at("spoken").textContent = message.content || message.trouble || "";
  keep();
  buttons();
  if (following) toEnd();
}

async function grow(message, article, [path, body], signal) {
  const said = article.querySelector(".said");
  let began = 0;
  let usage = null;
  let finish = null;
  let due = false;
  const paint = () => {
    due = false;
    show(said, message.content);
    if (following) toEnd();
  };
  for await (const chunk of stream(path, body, key, signal)) {
    usage = chunk.usage ?? usage;
    const choice = chunk.choices[0];
    if (!choice) continue;
    finish = choice.finish_reason ?? finish;
    const text = choice.delta?.content ?? choice.text ?? "";
    if (!text) continue;
    began ||= performance.now();
    message.content += text;
    if (!due) {
      due = true;
      requestAnimationFrame(paint);
    }
  }
  const seconds = (performance.now() - began) / 1000;
  const facts = [];
  if (usage) facts.push(`${usage.completion_tokens} tokens`);
  if (usage && began && usage.completion_tokens > 1) facts.push(`${((usage.completion_tokens - 1) / seconds).toFixed(0)} tokens/s`);
  if (finish === "length") facts.push("cut at the limit");
  message.facts = facts.join(" · ");
  if (!message.content) message.facts = "an empty answer";
}

// ---------------------------------------------------------------- the page

function toEnd() {
  at("scroll").scrollTop = at("scroll").scrollHeight;
}

function buttons() {
  const send = at("send");
  at("send-icon").setAttribute("href", running ? "#i-stop" : "#i-send");
  send.title = running ? "Stop" : "Send";
  send.disabled = !running && (!at("text").value.trim() || !model);
}

function fit() {
  const text = at("text");
  text.style.height = "auto";
  text.style.height = `${text.scrollHeight}px`;
  buttons();
}

function submit() {
  const text = at("text").value;
  if (running || !model || !text.trim()) return;
  at("text").value = "";
  fit();
  ask(model.chat ? text.trim() : text);
}

at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) running.abort();
  else submit();
});
at("text").addEventListener("input", fit);
at("text").addEventListener("keydown", (event) => {
  // Enter ends a composition of Korean, Japanese or Chinese first
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  submit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running && !at("settings").open) running.abort();
});
at("starters").addEventListener("click", (event) => {
  const chosen = event.target.closest("button");
  if (chosen && model && !running) ask(chosen.textContent);
});
at("log").addEventListener("click", (event) => {
  const from = event.target.closest(".copy-code");
  if (from) copy(from.closest(".code").querySelector("code").textContent, from);
});
at("new").addEventListener("click", () => {
  running?.abort();
  messages = [];
  keep();
  draw();
  at("text").focus();
});
at("scroll").addEventListener("scroll", () => {
  const { scrollTop, scrollHeight, clientHeight } = at("scroll");
  following = scrollHeight - scrollTop - clientHeight < NEAR;
  at("down").hidden = following;
});
at("down").addEventListener("click", () => {
  following = true;
  toEnd();
});

// ---------------------------------------------------------------- settings

function showSettings() {
  at("set-system").value = settings.system;
  at("set-temperature").value = settings.temperature;
  at("set-top-p").value = settings.topP;
  at("set-tokens").value = settings.tokens ?? "";
  at("set-key").value = key;
  at("show-temperature").textContent = settings.temperature.toFixed(2);
  at("show-top-p").textContent = settings.topP.toFixed(2);
}

function openSettings(why = "") {
  showSettings();
  at("settings-title").textContent = why || "Settings";
  if (!at("settings").open) at("settings").showModal();
  if (why) at("set-key").focus();
}

at("open-settings").addEventListener("click", () => openSettings());
at("settings").addEventListener("input", () => {
  settings.system = at("set-system").value;
  settings.temperature = Number(at("set-temperature").value);
  settings.topP = Number(at("set-top-p").value);
  settings.tokens = Math.floor(Number(at("set-tokens").value)) || null;
  key = at("set-key").value.trim();
  at("show-temperature").textContent = settings.temperature.toFixed(2);
  at("show-top-p").textContent = settings.topP.toFixed(2);
  write(localStorage, "moai.settings", settings);
  write(sessionStorage, "moai.key", key);
});
at("defaults").addEventListener("click", () => {
  Object.assign(settings, DEFAULTS);
  write(localStorage, "moai.settings", settings);
  showSettings();
});
at("settings").addEventListener("click", (event) => {
  if (event.target === at("settings")) at("settings").close(); // beside it
});
at("settings").addEventListener("close", connect);

draw();
fit();
connect();
