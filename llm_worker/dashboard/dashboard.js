// Starts the page, and requests its data every second.

import { startAsking } from "./ask.js";
import { showFleet } from "./fleet.js";
import { element, setText } from "./format.js";
import { showRecent, startTimeline } from "./timeline.js";

const INTERVAL_MS = 1000;
const TIMEOUT_MS = 5000;

let timer = null;
let previous = null;
// What the form needs of the worker; the limit is known with the first answer.
const worker = { model: "", maxBodyBytes: Infinity };

function showState(isReady, text) {
  const state = element("ready");
  state.className = isReady ? "state good" : "state bad";
  setText(state, text);
}

function show(data) {
  showState(data.ready, data.ready ? "ready" : data.reason || `none of the ${data.fleet ?? "encoders"} is ready`);
  worker.maxBodyBytes = data.max_body_bytes;
  element("ask-card").hidden = !data.can_ask;
  if (!data.engine) return; // the model is not loaded yet
  worker.model = data.model;
  setText(element("model"), data.model);
  showFleet(data, previous);
  showRecent(data.recent);
}

async function request() {
  const answer = await fetch("dashboard/data", { signal: AbortSignal.timeout(TIMEOUT_MS) });
  if (!answer.ok) throw new Error(`status ${answer.status}`);
  return { ...(await answer.json()), at: performance.now() };
}

async function poll() {
  clearTimeout(timer);
  timer = null;
  try {
    const data = await request();
    element("page").classList.remove("stale");
    show(data);
    previous = data.engine ? data : null;
  } catch (error) {
    console.debug(error);
    showState(false, "the worker does not answer");
    element("page").classList.add("stale");
  }
  if (!document.hidden) timer = setTimeout(poll, INTERVAL_MS);
}

startAsking(worker);
startTimeline();
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && timer === null) poll();
});
poll();
