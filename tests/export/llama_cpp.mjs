// llama.cpp, by node-llama-cpp, on a job of the tests: node llama_cpp.mjs FOLDER-OF-THE-PACKAGE JOB.json ANSWER.json
// A job is a list of {model, prompts: [[id, ...]], tokens, strings}. The answer to each: the ids of the strings, as
// ordinary text, and for each prompt the greedy ids and the probabilities of every token at each step.
import {readFileSync, writeFileSync} from "node:fs";
import {join} from "node:path";
import {pathToFileURL} from "node:url";

const [folder, job, answer] = process.argv.slice(2);
const entry = pathToFileURL(join(folder, "node_modules/node-llama-cpp/dist/index.js"));
const {getLlama} = await import(entry);
const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});

const answers = [];
for (const {model: modelPath, prompts, tokens, strings} of JSON.parse(readFileSync(job, "utf8"))) {
    const model = await llama.loadModel({modelPath});
    const ids = strings.map((text) => [...model.tokenize(text, false)]);
    const context = await model.createContext({
        contextSize: 512, flashAttention: false, threads: 1, // more of them wait for each other on a busy machine
        experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32"
    });
    const sequence = context.getSequence();
    const continued = [];
    for (const prompt of prompts) {
        await sequence.clearHistory();
        const steps = [];
        let pending = prompt;
        for (let step = 0; step < tokens; step++) {
            const last = [pending.at(-1), {generateNext: {probabilities: true}}];
            const {next} = (await sequence.controlledEvaluate([...pending.slice(0, -1), last])).at(-1);
            const probabilities = new Array(next.probabilities.size);
            for (const [id, probability] of next.probabilities)
                probabilities[id] = probability;
            const best = next.probabilities.keys().next().value;
            steps.push({id: best, probabilities});
            pending = [best];
        }
        continued.push(steps);
    }
    await context.dispose();
    await model.dispose();
    answers.push({ids, continued});
}
writeFileSync(answer, JSON.stringify(answers));
process.exit(0);
