// The last requests, each with the stages that its time went to, on one time axis.

import { NONE, count, element, make, milliseconds, plural, setText } from "./format.js";

const SHOWN_REQUESTS = 12;
const LANE_PX = 13;
const MIN_LANE_PX = 4;
const LANES_PX = 91; // of all lanes of a request, while they are not too thin for that
const TICK_PX = 72; // at least this far apart

// The worker's names of stages, by the words of the legend. Waiting is also what lies in front of a lane's first stage.
const WORDS = {
  queue: "waiting",
  load: "load",
  preprocess: "preprocess",
  forward: "tower",
  ship: "transport",
  prefill: "prefill",
  land: "land", // behind prefill, so that it is drawn on it: a step lands embeddings before it computes
  decode: "decode",
};
const LEGEND = {
  waiting: "for a free encoder, a batch or embeddings",
  load: "get the file",
  preprocess: "decode, resize, cut into patches",
  tower: "run the vision tower",
  transport: "bring embeddings to the worker",
  land: "copy embeddings into the input buffers",
  prefill: "compute the prompt",
  decode: "compute the tokens after the first",
};

const rows = new Map(); // by `keyOf`
const figures = new Map(); // of the legend, by word
let recent = [];
let selected = null; // the key of the request that was pointed at; the newest one before

export function startTimeline() {
  for (const [word, meaning] of Object.entries(LEGEND)) {
    const name = make("dt", "", word);
    name.prepend(make("i", `key stage-${word}`));
    name.title = meaning;
    const figure = make("dd", "", NONE);
    figures.set(word, figure);
    const pair = make("div");
    pair.append(name, figure);
    element("legend").append(pair);
  }
  element("scale").addEventListener("change", showScale);
  addEventListener("resize", showScale);
}

// requests: oldest first, as the worker keeps them.
export function showRecent(requests) {
  recent = requests.slice(-SHOWN_REQUESTS).reverse();
  const keys = new Set(recent.map(keyOf));
  for (const [key, row] of rows) {
    if (keys.has(key)) continue;
    row.remove();
    rows.delete(key);
  }
  // Rows stay the same elements, so that focus and pointer stay where they are.
  for (const request of [...recent].reverse()) {
    if (rows.has(keyOf(request))) continue;
    const row = requestRow(request);
    rows.set(keyOf(request), row);
    element("recent").prepend(row);
  }
  element("no-requests").hidden = recent.length > 0;
  element("recent-card").classList.toggle("empty", !recent.length);
  if (!rows.has(selected)) selected = null;
  showSelected();
  showScale();
}

// Callers may give several requests one id.
function keyOf(request) {
  return `${request.request_id} ${request.finished_at}`;
}

function requestRow(request) {
  const stages = stagesOf(request);
  const row = make("li");
  const button = make("button", "request");
  button.type = "button";
  const label = make("span", "what");
  label.append(
    make("b", "", `TTFT ${milliseconds(request.first_token_ms)}`),
    " ",
    make("span", "dim", size(request)),
    make("span", "unseen", `: ${times(stages)}`),
  );
  const lanes = make("span", "lanes");
  const numLanes = 1 + Math.max(...stages.map((stage) => stage.lane));
  const lanePx = Math.max(MIN_LANE_PX, Math.min(LANE_PX, LANES_PX / numLanes));
  lanes.style.height = `${numLanes * lanePx}px`;
  lanes.style.setProperty("--lane", `${lanePx}px`);
  lanes.append(...stages.map(bar));
  button.append(label, lanes);
  for (const name of ["pointerenter", "focus", "click"]) {
    button.addEventListener(name, () => select(keyOf(request)));
  }
  row.append(button);
  return row;
}

// A lane for each media item that an encoder worked for, then one for the worker. Each begins with waiting.
function stagesOf(request) {
  const laneOf = (stage) => stage.item_index ?? request.num_items;
  const used = [...new Set(request.stages.map(laneOf))].sort((one, other) => one - other);
  const stages = request.stages.map((stage) => ({
    word: WORDS[stage.name],
    lane: used.indexOf(laneOf(stage)),
    startMs: Math.max(0, stage.start_ms),
    durationMs: stage.duration_ms,
  }));
  const waits = used.map((_, lane) => {
    const starts = stages.filter((stage) => stage.lane === lane).map((stage) => stage.startMs);
    return { word: "waiting", lane, startMs: 0, durationMs: Math.min(...starts) };
  });
  const order = Object.values(WORDS);
  return [...waits, ...stages].sort((one, other) => order.indexOf(one.word) - order.indexOf(other.word));
}

function bar({ word, lane, startMs, durationMs }) {
  const node = make("span", `bar stage-${word}`);
  node.style.setProperty("--start", startMs);
  node.style.setProperty("--duration", durationMs);
  node.style.setProperty("--index", lane);
  node.title = `${word} ${milliseconds(durationMs)}`;
  node.hidden = !durationMs;
  return node;
}

function size(request) {
  const cached = request.num_cached_tokens ? `, ${count(request.num_cached_tokens)} cached` : "";
  const media = request.num_items ? plural(request.num_items, "item") : "text only";
  return `${media}, ${plural(request.num_prompt_tokens, "token")}${cached}`;
}

// The time of each stage: in a lane its sum, of several lanes the longest.
function longest(stages) {
  const sums = new Map();
  for (const { word, lane, durationMs } of stages) {
    const ofLanes = sums.get(word) ?? new Map();
    sums.set(word, ofLanes.set(lane, (ofLanes.get(lane) ?? 0) + durationMs));
  }
  return new Map([...sums].map(([word, ofLanes]) => [word, Math.max(...ofLanes.values())]));
}

// What the bars show, for screen readers.
function times(stages) {
  return [...longest(stages)].map(([word, ms]) => `${word} ${milliseconds(ms)}`).join(", ");
}

function select(key) {
  selected = key;
  showSelected();
}

function showSelected() {
  const request = recent.find((each) => keyOf(each) === selected) ?? recent[0];
  for (const [key, row] of rows) row.classList.toggle("selected", key === keyOf(request));
  const ms = request ? longest(stagesOf(request)) : new Map();
  for (const [word, figure] of figures) setText(figure, ms.has(word) ? milliseconds(ms.get(word)) : NONE);
  setText(element("selected"), request ? caption(request) : "");
}

function caption(request) {
  const at = new Date(1000 * request.finished_at).toLocaleTimeString("en-GB");
  const several = request.num_items > 1 ? "; of several items the longest time" : "";
  return `${request.request_id}, finished at ${at}${several}`;
}

// A step of 1, 2 or 5 times a power of ten, at least `ms`.
function niceStep(ms) {
  const power = 10 ** Math.floor(Math.log10(ms));
  return [1, 2, 5, 10].map((factor) => factor * power).find((step) => step >= ms);
}

function showScale() {
  if (!recent.length) return;
  const name = element("scale").querySelector(":checked").value;
  const longestMs = Math.max(1, ...recent.map((request) => request[name]));
  const widthPx = element("ticks").clientWidth;
  const stepMs = niceStep(longestMs / Math.max(2, Math.floor(widthPx / TICK_PX)));
  const scaleMs = stepMs * Math.ceil(longestMs / stepMs);
  const chart = element("chart");
  if (chart.dataset.scale === `${scaleMs}/${stepMs}`) return;
  chart.dataset.scale = `${scaleMs}/${stepMs}`;
  chart.style.setProperty("--scale", scaleMs);
  const ticks = [];
  for (let index = 0; index * stepMs <= scaleMs; index += 1) {
    const ms = index * stepMs;
    const tick = make("span", "tick", ms < 1 && ms ? `${ms.toFixed(1)} ms` : `${count(ms)} ms`);
    tick.style.left = `${(100 * ms) / scaleMs}%`;
    ticks.push(tick);
  }
  element("ticks").replaceChildren(...ticks);
}
