// llama.cpp by its Node.js bindings' prebuilt library, on the GGUF file itself: a worker as protocol.py describes.
import {readFileSync, writeFileSync} from "node:fs";
import {dirname, join} from "node:path";
import {createInterface} from "node:readline";
import {pathToFileURL} from "node:url";
import {parseArgs} from "node:util";

const names = ["model", "gguf", "cache", "variant", "longest", "conversations", "threads"];
const given = parseArgs({options: Object.fromEntries(names.map((name) => [name, {type: "string"}]))}).values;
if (given.gguf === undefined) {
    say({error: "it takes GGUF files alone"});
    process.exit(1);
}

const packages = join(dirname(given.cache), "llama-cpp", "node_modules");
const {getLlama} = await import(pathToFileURL(join(packages, "node-llama-cpp", "dist", "index.js")));
const version = JSON.parse(readFileSync(join(packages, "node-llama-cpp", "package.json"))).version;

const llama = await getLlama({gpu: false, build: "never", skipDownload: true, maxThreads: Number(given.threads)});
const model = await llama.loadModel({modelPath: given.gguf});
let context, sequences = [];

async function fresh(conversations) {
    await context?.dispose();
    context = await model.createContext({
        sequences: conversations,
        contextSize: Number(given.longest),
        batchSize: 2048,
        flashAttention: true,
        threads: Number(given.threads)
    });
    sequences = Array.from({length: conversations}, () => context.getSequence());
}

async function answer(number, full, outputs, made) {
    const sequence = sequences[number], held = sequence.contextTokens;
    const differ = full.findIndex((token, at) => token !== held[at]);
    if (differ < held.length) await sequence.eraseContextTokenRanges([{start: differ, end: held.length}]);
    let left = outputs;
    for await (const token of sequence.evaluate(full.slice(differ), {temperature: 0, yieldEogToken: true})) {
        made(number, token);
        if (--left === 0) break;
    }
}

async function measure({conversations, outputs}) {
    if (sequences.length !== conversations.length) await fresh(conversations.length);
    const tokens = conversations.map(() => []), times = [];
    const now = () => [performance.now() / 1e3, Object.values(process.cpuUsage()).reduce((a, b) => a + b) / 1e6];
    let begun = 0;
    const start = now();
    await Promise.all(conversations.map((full, number) => answer(number, full, outputs, (of, token) => {
        times.push(now());
        tokens[of].push(token);
        if (!begun && tokens.every((each) => each.length)) begun = times.length;
    })));
    const found = {tokens, peak_mib: Number(/VmHWM:\s+(\d+)/.exec(readFileSync("/proc/self/status", "ascii"))[1]) / 1024};
    for (const [place, name] of [[0, ""], [1, "cpu_"]]) {
        found[`ttft_${name}s`] = times[begun - 1][place] - start[place];
        if (times.length > begun) {
            found[`token_${name}s`] = (times.at(-1)[place] - times[begun - 1][place]) / (times.length - begun);
        }
    }
    return found;
}

function say(reply) {
    process.stdout.write(JSON.stringify(reply) + "\n");
}

say({versions: {"node-llama-cpp": version, "llama.cpp": llama.llamaCppRelease.release}});
for await (const line of createInterface({input: process.stdin})) {
    const request = JSON.parse(line);
    try {
        if (request.fresh) {
            sequences = [];
            writeFileSync("/proc/self/clear_refs", "5");
            say({});
        } else say(await measure(request));
    } catch (error) {
        say({error: String(error).slice(0, 500)});
    }
}
process.exit(0);
