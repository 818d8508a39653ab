// The page: two sentences in, their similarity out.
import { cosine, Embedder } from "./embedder.js";

const [form] = document.forms;
const status = document.getElementById("status");
const similarity = document.getElementById("similarity");

/** Shows a failure where the reader looks for progress. */
async function reporting(work) {
  try {
    await work();
  } catch (error) {
    status.textContent = `Error: ${error.message}`;
  }
}

let embedder;

async function compare() {
  const start = performance.now();
  const one = await embedder.embed(document.getElementById("one").value);
  const other = await embedder.embed(document.getElementById("other").value);
  similarity.textContent = cosine(one, other).toFixed(4);
  status.textContent = `Both embedded in ${Math.round(performance.now() - start)} ms.`;
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  reporting(compare);
});

await reporting(async () => {
  embedder = await Embedder.load("model");
  form.querySelector("button").disabled = false;
  await compare();
});
