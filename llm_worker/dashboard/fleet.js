// The worker's figures, and the table of its encoders (or of a decode worker's prefill workers).

import { NONE, bytes, count, element, make, percent, rate, setText, shownRate } from "./format.js";

const rows = new Map(); // by address
const figures = new Map([...document.querySelectorAll("[data-figure]")].map((node) => [node.dataset.figure, node]));
const columns = [...document.querySelectorAll("#encoders-card th")].map((head) => head.textContent);
const FIRST_NUMBER = columns.indexOf("in flight");

export function showFleet(data, previous) {
  const seconds = previous ? (data.at - previous.at) / 1000 : 0;
  showWorker(data, previous ? previous.engine : {}, seconds);
  setText(element("encoders-title"), data.fleet === "encoders" ? "Encoders" : "Prefill workers");
  element("no-encoders").hidden = data.encoders.length > 0;
  const before = new Map((previous ? previous.encoders : []).map((encoder) => [encoder.address, encoder.stats]));
  for (const encoder of data.encoders) showEncoder(encoder, before.get(encoder.address) || {}, seconds);
  const addresses = new Set(data.encoders.map((encoder) => encoder.address));
  for (const [address, row] of rows) {
    if (addresses.has(address)) continue;
    row.remove();
    rows.delete(address);
  }
}

function showWorker(data, before, seconds) {
  const engine = data.engine;
  const perSecond = (name) => shownRate(rate(engine[name], before[name], seconds), (value) => count(Math.round(value)));
  const shown = {
    running: count(engine.running),
    waiting: count(engine.waiting),
    prefill: perSecond("num_prefill_tokens"),
    decode: perSecond("num_decode_tokens"),
    queued: count(engine.queued_prefill_tokens),
    cached: percent(engine.num_cached_tokens, engine.num_cached_tokens + engine.num_prefill_tokens),
    preempted: count(engine.num_preempted),
    retries: count(data.client.retries),
  };
  for (const [name, text] of Object.entries(shown)) setText(figures.get(name), text);
  const { kv_blocks_used: used, kv_blocks_kept: kept, kv_blocks_total: total } = engine;
  setText(element("blocks-text"), `${count(used)} used, ${count(kept)} kept of ${count(total)}`);
  const [usedBar, keptBar] = element("blocks").children;
  usedBar.style.width = `${(100 * used) / total}%`;
  keptBar.style.width = `${(100 * kept) / total}%`;
}

function showEncoder(encoder, earlier, seconds) {
  if (!rows.has(encoder.address)) {
    const row = makeRow(encoder.address);
    rows.set(encoder.address, row);
    element("encoders").append(row);
  }
  const [head, state, ...cells] = rows.get(encoder.address).children;
  setText(head.querySelector(".error"), encoder.error || "");
  const [style, text] = encoder.ready ? ["state good", "ready"] : encoder.idle ? ["state", "idle"] : ["state bad", "away"];
  state.firstChild.className = style;
  setText(state.firstChild, text);
  const texts = [encoder.transport || NONE, count(encoder.in_flight), ...statistics(encoder.stats, earlier, seconds)];
  cells.forEach((cell, index) => setText(cell, texts[index]));
}

function makeRow(address) {
  const row = make("tr");
  const head = make("th", "", address);
  head.scope = "row";
  head.append(make("small", "error"));
  const state = make("td");
  state.append(make("span"));
  row.append(head, state);
  for (let column = 2; column < columns.length; column += 1) {
    row.append(make("td", column < FIRST_NUMBER ? "" : "number"));
  }
  // On narrow screens the head of the table is hidden, and each cell shows its own.
  [...row.children].forEach((cell, column) => cell.setAttribute("data-head", columns[column]));
  return row;
}

function statistics(stats, earlier, seconds) {
  if (!stats) return Array(columns.length - FIRST_NUMBER - 1).fill(NONE);
  const items = numItems(stats);
  return [
    `${stats.queue_seconds.toFixed(2)} s`,
    shownRate(rate(items, numItems(earlier), seconds), (value) => value.toFixed(1)),
    shownRate(rate(numShipped(stats), numShipped(earlier), seconds), bytes),
    percent(stats.num_cache_hits + stats.num_cache_joined, items),
    bytes(stats.cache_gpu_bytes + stats.cache_host_bytes),
    count(stats.num_live_leases),
  ];
}

function numItems(stats) {
  return stats.num_cache_hits === undefined
    ? undefined
    : stats.num_cache_hits + stats.num_cache_joined + stats.num_cache_misses;
}

function numShipped(stats) {
  return stats.shipped_bytes && Object.values(stats.shipped_bytes).reduce((sum, value) => sum + value, 0);
}
