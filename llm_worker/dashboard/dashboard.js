"use strict";

const STAGES = ["load", "preprocess", "queue", "forward", "ship", "land", "prefill", "decode"];
const INTERVAL_MS = 1000;
const SHOWN_REQUESTS = 15;
const LANE_PX = 13;

const element = (id) => document.getElementById(id);
let model = "";
let previous = null;

// Everything is set as text: names and ids come from clients.
function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function bytes(count) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (count >= 1000 && unit < units.length - 1) {
    count /= 1000;
    unit += 1;
  }
  return `${count.toFixed(unit && count < 100 ? 1 : 0)} ${units[unit]}`;
}

function milliseconds(ms) {
  return ms < 1000 ? `${ms.toFixed(ms < 10 ? 1 : 0)} ms` : `${(ms / 1000).toFixed(2)} s`;
}

// Per second since the last answer; null at first, and after a counter was reset.
function rate(now, before, seconds) {
  return before === undefined || before === null || now < before || !seconds ? null : (now - before) / seconds;
}

function shownRate(value, format) {
  return value === null ? "" : format(value);
}

function total(object) {
  return Object.values(object).reduce((sum, value) => sum + value, 0);
}

function numItems(stats) {
  return stats.num_cache_hits + stats.num_cache_joined + stats.num_cache_misses;
}

function showWorker(data, seconds) {
  const engine = data.engine;
  const before = previous ? previous.engine : {};
  const perSecond = (name) => shownRate(rate(engine[name], before[name], seconds), (value) => `${value.toFixed(0)}/s`);
  const cached = engine.num_cached_tokens + engine.num_prefill_tokens;
  const rows = [
    ["requests", `${engine.running} running, ${engine.waiting} waiting`],
    ["prefill", `${perSecond("num_prefill_tokens")} tokens, ${engine.queued_prefill_tokens} queued`],
    ["decode", `${perSecond("num_decode_tokens")} tokens`],
    ["prefix cache", cached ? `${((100 * engine.num_cached_tokens) / cached).toFixed(0)} % of prompt tokens` : "unused"],
    ["KV blocks", `${engine.kv_blocks_used} used, ${engine.kv_blocks_kept} kept of ${engine.kv_blocks_total}`],
    ["preempted", `${engine.num_preempted}`],
    ["retried on another encoder", `${data.client.retries}`],
  ];
  element("worker").replaceChildren(...rows.flatMap(([name, value]) => [make("dt", "", name), make("dd", "", value)]));
}

function encoderRow(encoder, before, seconds) {
  const row = make("tr");
  const add = (text, className) => row.append(make("td", className, text));
  add(encoder.address);
  const state = make("td");
  state.append(make("span", encoder.ready ? "badge good" : "badge bad", encoder.ready ? "ready" : "away"));
  state.title = encoder.error || "";
  row.append(state);
  add(encoder.transport || "");
  add(String(encoder.in_flight), "number");
  const stats = encoder.stats;
  if (!stats) {
    for (let column = 0; column < 6; column += 1) add("", "number");
    return row;
  }
  const earlier = before && before.stats;
  const items = numItems(stats);
  add(`${stats.queue_seconds.toFixed(2)} s`, "number");
  add(shownRate(rate(items, earlier && numItems(earlier), seconds), (value) => value.toFixed(1)), "number");
  const shipped = rate(total(stats.shipped_bytes), earlier && total(earlier.shipped_bytes), seconds);
  add(shownRate(shipped, bytes), "number");
  add(items ? `${((100 * (stats.num_cache_hits + stats.num_cache_joined)) / items).toFixed(0)} %` : "", "number");
  add(bytes(stats.cache_gpu_bytes + stats.cache_host_bytes), "number");
  add(String(stats.num_live_leases), "number");
  return row;
}

function requestRow(request, scaleMs) {
  const row = make("div", "request");
  const cached = request.num_cached_tokens ? ` (${request.num_cached_tokens} cached)` : "";
  const size = `${request.num_items} media, ${request.num_prompt_tokens} tokens${cached}`;
  const what = `TTFT ${milliseconds(request.ttft_ms)}: ${size}`;
  const label = make("div", "what", what);
  label.title = request.request_id;
  const lanes = make("div", "lanes");
  // A lane for each media item, then one for the worker.
  lanes.style.height = `${(request.num_items + 1) * LANE_PX}px`;
  for (const stage of request.stages) {
    const bar = make("div", `bar stage-${stage.name}`);
    const lane = stage.item_index === null ? request.num_items : stage.item_index;
    bar.style.left = `${(100 * Math.max(0, stage.start_ms)) / scaleMs}%`;
    bar.style.width = `${(100 * stage.duration_ms) / scaleMs}%`;
    bar.style.top = `${lane * LANE_PX}px`;
    bar.title = `${stage.name} ${milliseconds(stage.duration_ms)}`;
    lanes.append(bar);
  }
  row.append(label, lanes);
  return row;
}

function showRecent(recent) {
  const shown = recent.slice(-SHOWN_REQUESTS).reverse();
  const scaleMs = Math.max(1, ...shown.map((request) => request.elapsed_ms));
  element("recent").replaceChildren(...shown.map((request) => requestRow(request, scaleMs)));
  if (!shown.length) element("recent").append(make("p", "dim", "None yet."));
}

function show(data, seconds) {
  element("ready").textContent = data.ready ? "ready" : data.reason || "no encoder";
  element("ready").className = data.ready ? "badge good" : "badge bad";
  if (!data.engine) return;
  model = data.model;
  element("model").textContent = model;
  const before = new Map((previous ? previous.encoders : []).map((encoder) => [encoder.address, encoder]));
  showWorker(data, seconds);
  const rows = data.encoders.map((encoder) => encoderRow(encoder, before.get(encoder.address), seconds));
  element("encoders").replaceChildren(...rows);
  showRecent(data.recent);
}

async function poll() {
  try {
    const answer = await fetch("/dashboard/data");
    const data = await answer.json();
    data.at = performance.now();
    show(data, previous ? (data.at - previous.at) / 1000 : 0);
    previous = data.engine ? data : null;
  } catch {
    element("ready").textContent = "the worker does not answer";
    element("ready").className = "badge bad";
  }
  setTimeout(poll, INTERVAL_MS);
}

function asDataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

async function choose(file) {
  if (!file) return;
  element("preview").src = await asDataUrl(file);
  element("preview").hidden = false;
  element("hint").hidden = true;
}

// Server-sent events: the text of each chunk, as it comes.
async function* pieces(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (let read = await reader.read(); !read.done; read = await reader.read()) {
    const events = (pending + read.value).split("\n\n");
    pending = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}

async function ask(event) {
  event.preventDefault();
  const answer = element("answer");
  const button = element("ask").querySelector("button");
  const content = [{ type: "text", text: element("question").value }];
  if (!element("preview").hidden) content.unshift({ type: "image_url", image_url: { url: element("preview").src } });
  const body = { model, messages: [{ role: "user", content }], stream: true, max_tokens: 512, temperature: 0 };
  body.stream_options = { include_usage: true };
  answer.textContent = "";
  answer.className = "";
  element("answer-note").textContent = "";
  button.disabled = true;
  try {
    const headers = { "Content-Type": "application/json" };
    const response = await fetch("/v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body) });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const chunk of pieces(response)) {
      if (chunk.choices.length) answer.textContent += chunk.choices[0].delta.content || "";
      if (chunk.timings) element("answer-note").textContent = `first token after ${milliseconds(chunk.timings.ttft_ms)}`;
    }
  } catch (error) {
    answer.textContent = error.message;
    answer.className = "failed";
  }
  button.disabled = false;
}

function start() {
  element("legend").replaceChildren(...STAGES.flatMap((name) => [make("span", `key stage-${name}`), name]));
  element("ask").addEventListener("submit", ask);
  element("picture").addEventListener("change", (event) => choose(event.target.files[0]));
  const drop = element("drop");
  for (const name of ["dragover", "dragleave", "drop"]) {
    drop.addEventListener(name, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", name === "dragover");
    });
  }
  drop.addEventListener("drop", (event) => choose(event.dataTransfer.files[0]));
  poll();
}

start();
