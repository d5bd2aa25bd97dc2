// The form that asks the worker's own API, and the answer.

import { chatChunks } from "./chat_stream.js";
import { element, make, milliseconds, plural } from "./format.js";
import { MediaList } from "./media_list.js";

const MAX_TOKENS = 512;

let running = null; // the AbortController of the question in flight

// worker: its `model`, and `maxBodyBytes` of a request.
export function startAsking(worker) {
  const media = new MediaList(() => {
    showProblem(""); // it may have been of what is no longer sent
    showWhatIsSent(media);
  });
  showWhatIsSent(media);
  const add = (files) => showProblem(media.add(files, worker.maxBodyBytes).join(" "));
  const form = element("ask");
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!running) ask(worker.model, media);
  });
  element("stop").addEventListener("click", () => running.abort());
  element("question").addEventListener("keydown", (event) => {
    // Enter that ends the composition of a character is not ours.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    form.requestSubmit();
  });
  element("files").addEventListener("change", (event) => {
    add(event.target.files);
    event.target.value = ""; // the same file can be chosen again
  });
  takeFiles(add);
}

// Files may be dropped anywhere: beside a small target the browser would leave the page to show the file.
function takeFiles(add) {
  const card = element("ask-card");
  const hasFiles = (event) => event.dataTransfer.types.includes("Files");
  addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    card.classList.add("over");
  });
  addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) card.classList.remove("over"); // has left the window
  });
  addEventListener("drop", (event) => {
    card.classList.remove("over");
    if (!hasFiles(event)) return;
    event.preventDefault();
    add(event.dataTransfer.files);
  });
  addEventListener("paste", (event) => {
    if (!event.clipboardData.files.length) return;
    event.preventDefault();
    add(event.clipboardData.files);
  });
}

function showWhatIsSent(media) {
  const isText = !media.items.length;
  const node = element("what-is-sent");
  node.classList.toggle("text-only", isText);
  node.textContent = isText ? "Text only: no picture is sent" : `With ${media.words}`;
}

function showProblem(text) {
  element("problem").textContent = text;
  element("problem").hidden = !text;
}

async function ask(model, media) {
  const question = element("question");
  if (!question.value.trim()) {
    showProblem("Write a question first.");
    question.focus();
    return;
  }
  const answer = element("answer");
  const sent = media.words;
  const begin = performance.now();
  const figures = [];
  running = new AbortController();
  showRunning(true);
  showProblem("");
  answer.textContent = "";
  answer.classList.remove("unused");
  note([sent, "waiting for the first token"]);
  try {
    const content = [...(await media.parts()), { type: "text", text: question.value }];
    for await (const chunk of chatChunks(chatBody(model, content), running.signal)) {
      const [choice] = chunk.choices;
      if (choice?.delta.content) {
        if (!answer.textContent) {
          figures.push(`first token after ${milliseconds(performance.now() - begin)}`);
          note([sent, ...figures]);
        }
        answer.append(choice.delta.content);
      }
      if (choice?.finish_reason === "length") figures.push(`cut at ${MAX_TOKENS} tokens`);
      else if (choice?.finish_reason && !answer.textContent) figures.push("the answer is empty");
      if (chunk.usage) figures.push(plural(chunk.usage.completion_tokens, "token"));
    }
  } catch (error) {
    if (error.name === "AbortError") figures.push("stopped");
    else showProblem(error.message);
  } finally {
    running = null;
    showRunning(false);
    note(figures.length ? [sent, ...figures] : []);
  }
}

function chatBody(model, content) {
  return {
    model,
    messages: [{ role: "user", content }],
    max_tokens: MAX_TOKENS,
    temperature: 0,
    stream: true,
    stream_options: { include_usage: true },
  };
}

function showRunning(isRunning) {
  const stop = element("stop");
  if (document.activeElement === stop) element("question").focus(); // a hidden button loses the focus
  stop.hidden = !isRunning;
  element("ask").querySelector("[type=submit]").setAttribute("aria-disabled", isRunning);
  // Screen readers read the whole answer at its end, not every token.
  element("answer").setAttribute("aria-busy", isRunning);
}

function note(words) {
  const spans = words.map((word) => make("span", word === "text only" ? "text-only" : "", word));
  element("answer-note").replaceChildren(...spans);
}
