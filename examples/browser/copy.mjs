// Copies what the page loads out of node_modules, so that a server needs no more than this folder.
import { cpSync, mkdirSync, rmSync } from "node:fs";

const FILES = [
  "@huggingface/tokenizers/dist/tokenizers.min.mjs",
  "onnxruntime-web/dist/ort.wasm.min.mjs",
  "onnxruntime-web/dist/ort-wasm-simd-threaded.mjs",
  "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm",
];

rmSync("lib", { recursive: true, force: true });
mkdirSync("lib");
for (const file of FILES) {
  cpSync(`node_modules/${file}`, `lib/${file.split("/").at(-1)}`);
}
