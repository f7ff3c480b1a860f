"use strict";
// The live page: asks /admin/live once a second and draws what has changed, by key, so that nothing flickers, loses its
// focus or its scroll. All text comes from clients and engines: it is only ever set as text (the page's policy forbids
// to make markup of it). The token is kept in `token` here, and nowhere else.

const POLL_MS = 1000, SLOWEST_MS = 5000, ANSWER_MS = 6000, JOURNAL_MS = 2000;
const BAD_OUTCOMES = new Set(["none", "ok", "not_needed", ""]);
const WORDS = {  // of marks, where their names are not plain enough
  queued: "waits for an engine with room", turned_away: "turned away", chosen: "engines chosen", prefill_sent: "sent to prefill", prefill_answered: "prefill has answered",
  prefill_failed: "prefill failed", handoff_broke: "the handoff broke", decode_sent: "sent to decode",
  decode_answered: "decode's first byte", decode_failed: "decode failed", first_byte: "first byte to the client",
  deadline: "deadline passed", client_gone: "the client left", finished: "finished",
  open_send: "prefill's engine asks to send", claimed: "room claimed at prefill", granted: "grant heard", wait: "has to wait for room",
  lane: "lane connected", hand_over: "blocks handed over", send_ended: "sending has ended", reserve: "room asked for at decode",
  grant: "room granted at decode", open_load: "decode's engine asks to load", commit: "commit", put_failed: "a put failed",
  loaded: "decode's engine has loaded", receive_ended: "receiving has ended",
};
const HEALTH = {ready: "ready", alone: "serves alone: its daemon is silent", joining: "joining", lost: "lost", drained: "drained", ejected: "ejected: it keeps failing"};

let token = "", run = "", cursor = 0, keeps = 1000, paused = false, timer = 0, pause_ms = POLL_MS, lostSince = null;
let clockShift = 0;  // the router's clock less ours, in seconds
const requests = new Map();  // serial -> row
const items = new Map();  // serial -> its element
const opened = new Map();  // serial -> what its details show
const find = (id) => document.getElementById(id);

// --- asking ---------------------------------------------------------------------------------------------------------

async function ask(path) {
  const headers = token ? {Authorization: "Bearer " + token} : {};
  const reply = await fetch(path, {headers, cache: "no-store", credentials: "omit", signal: AbortSignal.timeout(ANSWER_MS)});
  if (reply.ok) return reply.json();
  const said = await reply.json().catch(() => null);
  const error = new Error(said?.error?.message || "HTTP " + reply.status);
  error.status = reply.status;
  throw error;
}

async function poll() {
  clearTimeout(timer);
  try {
    const live = await ask(`/admin/live?run=${encodeURIComponent(run)}&since=${cursor}`);
    pause_ms = live.more ? 0 : POLL_MS;
    lostSince = null;
    take(live);
    say("live", "live");
    document.body.classList.remove("stale");
  } catch (error) {
    if (error.status === 401) return wantToken();
    lostSince ??= new Date();
    pause_ms = Math.min(SLOWEST_MS, Math.max(POLL_MS, pause_ms * 1.5));
    const why = error.status ? `: ${error.message}` : "";
    say("lost", `no answer since ${clock(lostSince)}, trying again${why}`);
    document.body.classList.add("stale");
  }
  schedule();
}

function schedule() {
  clearTimeout(timer);
  if (!paused && !document.hidden) timer = setTimeout(poll, pause_ms);
}

function wantToken() {
  find("main").hidden = true;
  find("ask").hidden = false;
  find("refused").textContent = token ? "It was not accepted." : "";
  token = "";
  say("token", "locked");
  find("token").value = "";
  find("token").focus();
}

find("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  token = find("token").value.trim();
  find("token").value = "";
  poll();
});
find("pause").addEventListener("click", () => {
  paused = !paused;
  set(find("pause"), paused ? "Go on" : "Pause");
  find("pause").setAttribute("aria-pressed", String(paused));
  if (paused) { clearTimeout(timer); say("paused", "paused"); } else poll();
});
document.addEventListener("visibilitychange", () => { if (!document.hidden && !paused && find("ask").hidden) poll(); });

function say(state, text) {
  if (paused && state === "live") return;
  find("state").dataset.state = state;
  set(find("state"), text);
}

// --- what was told --------------------------------------------------------------------------------------------------

function take(live) {
  find("ask").hidden = true;
  find("main").hidden = false;
  clockShift = live.now_unix_s - Date.now() / 1000;
  keeps = live.keeps;
  if (live.run !== run) {
    if (run) note(`The router has started anew at ${clock(new Date(live.began_unix_s * 1000))}; requests are shown from then on.`);
    run = live.run;
    requests.clear(); opened.clear(); items.clear();
    find("requests").replaceChildren();
  }
  cursor = live.next;
  for (const row of live.requests) requests.set(row.serial, row);
  find("reasons").hidden = !live.reasons.length;
  keyed(find("reasons"), live.reasons, (reason) => reason, (reason) => make("li", "", [reason]), () => {});
  drawEngines(live.engines);
  drawDaemons(live.daemons);
  drawHandoffs(live.daemons);
  drawRequests(live.requests);
  const open = [...requests.values()].filter((row) => !row.code).length;
  set(find("facts"), `pdx ${live.version} · up ${span(live.now_unix_s - live.began_unix_s)} · ${count(open, "request")} under way` + (live.queued ? `, ${number(live.queued)} of them waiting for an engine` : ""));
}

function note(text) {
  find("note").hidden = false;
  set(find("note"), text);
}

function drawEngines(engines) {
  const most = Math.max(1, ...engines.map((e) => e.in_flight + e.waiting));
  keyed(find("engines").tBodies[0], engines, (e) => e.engine_id, () => {
    const cells = Array.from({length: 9}, () => make("td"));
    for (const at of [3, 4, 5]) cells[at].className = "number";
    cells[0].className = cells[8].className = "mono";
    cells[2].append(make("span", "health"));
    cells[6].append(bar(["part"]));
    return make("tr", "", cells);
  }, (tr, e) => {
    const cells = tr.cells, health = cells[2].firstChild;
    set(cells[0], e.engine_id); set(cells[1], e.role); set(health, HEALTH[e.health] ?? e.health);
    health.dataset.health = e.health;
    set(cells[3], e.in_flight); set(cells[4], e.in_line); set(cells[5], e.waiting);
    parts(cells[6].firstChild, [(e.in_flight + e.waiting) / most]);
    set(cells[7], e.model); cells[7].title = e.model;
    set(cells[8], e.daemon);
  });
  const roles = ["prefill", "decode", "both"].map((role) => [engines.filter((e) => e.role === role).length, role]);
  const bad = engines.filter((e) => e.health !== "ready").length;
  const words = roles.filter(([n]) => n).map(([n, role]) => `${n} ${role}`);
  set(find("engines-sum"), [...words, ...(bad ? [`${bad} not ready`] : [])].join(" · "));
  find("engines-none").hidden = engines.length > 0;
  find("engines").parentElement.hidden = !engines.length;
}

function drawDaemons(daemons) {
  keyed(find("daemons"), daemons, (d) => d.daemon, () => {
    const dl = make("dl");
    for (const name of ["arena", "disk", "hits", "handoffs"]) {
      const dd = make("dd", name, [...(name === "handoffs" ? [] : [bar(name === "arena" ? ["leased", "cached"] : name === "hits" ? ["arena-hit", "disk-hit"] : ["part"])]), make("span")]);
      dl.append(make("dt", name, [name]), dd);
    }
    const top = make("div", "top", [make("b", "mono"), make("small")]);
    return make("li", "", [top, make("div", "lanes"), make("p", "bad"), dl]);
  }, drawDaemon);
  const views = daemons.filter((d) => d.view);
  const sum = (what) => views.reduce((all, d) => all + d.view[what], 0);
  const room = sum("arena_bytes");
  set(find("daemons-sum"), room ? `${daemons.length} · arenas ${bytes(room)}, ${bytes(sum("leased_bytes"))} leased, ${bytes(sum("cached_bytes"))} cached` : String(daemons.length || ""));
  find("daemons-none").hidden = daemons.length > 0;
}

function drawDaemon(li, d) {
  const [top, lanes, bad, dl] = li.children, view = d.view;
  set(top.children[0], d.daemon);
  set(top.children[1], view && view.waiting ? `${count(view.waiting, "handoff")} waiting for room` : "");
  set(lanes, d.lanes.join("  ") || "no lane"); lanes.title = d.lanes.join("\n");
  set(bad, d.error ? d.error + (view ? `; shown as of ${span(d.view_s)} ago` : "") : "");
  bad.hidden = !d.error;
  dl.hidden = !view;
  if (!view) return;
  const [arena, disk, hits, handoffs] = dl.querySelectorAll("dd");
  const free = view.arena_bytes - view.leased_bytes - view.cached_bytes;
  parts(arena.children[0], [view.leased_bytes / view.arena_bytes, view.cached_bytes / view.arena_bytes]);
  const pinned = view.pinned_bytes ? `, ${bytes(view.pinned_bytes)} of it pinned` : "";
  set(arena.children[1], `${bytes(view.leased_bytes)} leased${pinned}, ${bytes(view.cached_bytes)} cached, ${bytes(free)} free`);
  disk.hidden = disk.previousSibling.hidden = !view.disk;
  if (view.disk) {
    const odd = [view.disk.state === "well" ? "" : view.disk.state, view.disk.waiting_writes ? count(view.disk.waiting_writes, "write") + " waiting" : "", view.disk.io_errors ? count(view.disk.io_errors, "error") : ""].filter(Boolean);
    parts(disk.children[0], [view.disk.used_bytes / Math.max(1, view.disk.cap_bytes)]);
    set(disk.children[1], [`${bytes(view.disk.used_bytes)} of ${bytes(view.disk.cap_bytes)}`, ...odd].join(", "));
    disk.classList.toggle("bad", view.disk.state !== "well");
  }
  const asked = view.lookup_blocks, share = (n) => asked ? n / asked : 0;
  parts(hits.children[0], [share(view.arena_hit_blocks), share(view.disk_hit_blocks)]);
  set(hits.children[1], asked ? `${percent(share(view.arena_hit_blocks))} arena, ${percent(share(view.disk_hit_blocks))} disk, of ${number(asked)} blocks` : "nothing was asked for");
  const failed = view.handoffs_failed ? `, ${number(view.handoffs_failed)} failed` : "";
  set(handoffs.children[0], `${number(view.handoffs_under_way)} under way, ${number(view.handoffs_ok)} done${failed}; ${bytes(view.sent_bytes)} sent`);
}

function drawHandoffs(daemons) {
  const halves = daemons.flatMap((d) => (d.view?.handoffs ?? []).map((h) => ({...h, at: d.daemon})));
  halves.sort((a, b) => b.age_s - a.age_s);
  keyed(find("handoffs").tBodies[0], halves, (h) => `${h.handoff} ${h.side} ${h.at}`, () => {
    const cells = Array.from({length: 7}, () => make("td"));
    cells[0].className = cells[1].className = cells[5].className = "mono";
    cells[4].append(bar(["part"]), make("small"));
    cells[6].className = "number";
    return make("tr", "", cells);
  }, (tr, h) => {
    const cells = tr.cells;
    set(cells[0], h.handoff.slice(0, 12)); cells[0].title = h.handoff;
    set(cells[1], h.at); set(cells[2], h.side + (h.is_spare ? ", spare" : "")); set(cells[3], h.state);
    parts(cells[4].children[0], [h.pages_wanted ? h.pages / h.pages_wanted : 0]);
    set(cells[4].children[1], h.pages_wanted ? `${number(h.pages)} of ${number(h.pages_wanted)}` : "not known yet");
    set(cells[5], h.peer === h.at ? "itself" : h.peer); set(cells[6], span(h.age_s));
  });
  const all = daemons.reduce((n, d) => n + (d.view?.handoffs_under_way ?? 0), 0);
  set(find("handoffs-sum"), all > halves.length ? `${halves.length} of ${all} halves` : all ? count(all, "half", "halves") : "none");
  find("handoffs-box").hidden = !halves.length;
}

// --- requests -------------------------------------------------------------------------------------------------------

function drawRequests(changed) {
  const list = find("requests");
  for (const row of changed) {
    let li = items.get(row.serial);
    if (!li) {
      li = newRequest(row.serial);
      items.set(row.serial, li);
      let after = list.firstChild;
      while (after && after.serial > row.serial) after = after.nextSibling;
      list.insertBefore(li, after);
    }
  }
  const stale = [...requests.keys()].sort((a, b) => b - a).slice(keeps);
  for (const serial of stale) { requests.delete(serial); opened.delete(serial); items.get(serial)?.remove(); items.delete(serial); }
  const told = new Set(changed.map((row) => row.serial));
  for (const [serial, row] of requests) if (told.has(serial) || !row.code) drawRequest(items.get(serial), row);
  for (const serial of opened.keys()) { if (told.has(serial)) refresh(serial, true); else refresh(serial, false); }
  filter();
}

function newRequest(serial) {
  const tracks = make("span", "tracks");
  tracks.setAttribute("aria-hidden", "true");
  const who = make("span", "who", [make("span", "mono"), make("small")]);
  const cells = [make("span", "began"), who, make("span", "way"), make("span", "ended"), make("span", "first number"), make("span", "total number"), tracks];
  const button = make("button", "row", cells);
  button.type = "button";
  const detail = make("div", "detail");
  detail.id = "detail-" + serial;
  detail.hidden = true;
  button.setAttribute("aria-expanded", "false");
  button.setAttribute("aria-controls", detail.id);
  button.addEventListener("click", () => toggle(serial));
  const li = make("li", "", [button, detail]);
  li.serial = serial;
  return li;
}

function drawRequest(li, row) {
  const [began, who, way, ended, first, total, tracks] = li.firstChild.children;
  set(began, clock(new Date(row.began_unix_s * 1000), true));
  set(who.children[0], row.request_id); set(who.children[1], row.model); who.title = `${row.request_id}\n${row.model}\n${row.path}`;
  set(way, row.way);
  const verdict = verdictOf(row);
  set(ended, verdict.text); ended.classList.toggle("bad", verdict.bad); ended.title = verdict.text;
  const opening = row.steps.find(([what]) => what === "first_byte");
  set(first, opening ? ms(opening[1]) : "–");
  const end = endOf(row);
  set(total, row.code ? ms(end) : ms(end) + " …");
  const marks = segments(row, end).map((s) => piece(`seg ${s.kind} ${s.up ? "up" : "down"}${s.failed ? " failed" : ""}`, s.from / end, (s.to - s.from) / end));
  if (opening) marks.push(piece("tick", Math.min(opening[1] / end, .995), 0));
  tracks.replaceChildren(...marks);
}

function verdictOf(row) {
  const words = row.reason || (BAD_OUTCOMES.has(row.outcome) ? "" : row.outcome);
  if (!row.code) return {text: "under way" + (words ? `: ${words}` : ""), bad: false};
  if (row.code === 499) return {text: "client left", bad: false};
  const broken = row.steps.some(([what]) => what === "decode_failed") && row.code === 200 && row.outcome !== "ok" && !row.reason;
  return {text: words ? `${row.code} ${words}` : String(row.code), bad: row.code >= 400 || broken};
}

function endOf(row) {
  const last = row.steps.at(-1);
  if (row.code && last) return Math.max(1, last[1]);
  return Math.max(1, last?.[1] ?? 0, (Date.now() / 1000 + clockShift - row.began_unix_s) * 1e6);
}

function segments(row, end) {
  const found = [], open = {};
  const close = (side, at, failed) => {
    if (open[side] === undefined) return;
    found.push({kind: side === "prefill" ? "prefill" : side, up: side === "prefill", from: open[side], to: at, failed});
    delete open[side];
  };
  for (const [what, at] of row.steps) {
    if (what === "prefill_sent") open.prefill = at;
    else if (what === "prefill_answered") close("prefill", at, false);
    else if (what === "prefill_failed" || what === "handoff_broke") close("prefill", at, true);
    else if (what === "decode_sent") { close("wait", at, true); open.wait = at; }
    else if (what === "decode_answered") { close("wait", at, false); open.stream = at; }
    else if (what === "decode_failed") { close("wait", at, true); close("stream", at, true); }
  }
  const failed = row.code >= 400;
  for (const side of Object.keys(open)) close(side, end, failed);
  return found;
}

function filter() {
  const words = find("find").value.trim().toLowerCase(), which = find("which").value;
  let shown = 0;
  for (const [serial, row] of requests) {
    const fits = (which === "all" || (which === "open" && !row.code) || (which === "failed" && verdictOf(row).bad) || (which === "alone" && row.way === "alone"))
      && (!words || [row.request_id, row.model, row.prefill, row.decode, row.reason, row.outcome, row.unseeded, row.path, row.handoff].some((text) => text.toLowerCase().includes(words)));
    const li = items.get(serial);
    if (li.hidden === fits) li.hidden = !fits;
    shown += fits;
  }
  set(find("requests-sum"), !requests.size ? "" : shown === requests.size ? `the last ${number(shown)}` : `${number(shown)} of the last ${number(requests.size)}`);
  find("requests-none").hidden = requests.size > 0;
}
find("find").addEventListener("input", filter);
find("which").addEventListener("change", filter);

// --- one request ----------------------------------------------------------------------------------------------------

function toggle(serial) {
  const [button, detail] = items.get(serial).children, show = detail.hidden;
  detail.hidden = !show;
  button.setAttribute("aria-expanded", String(show));
  if (!show) return void opened.delete(serial);
  opened.set(serial, {journal: null, asked: 0, error: ""});
  refresh(serial, true);
}

// Asks its daemons as long as something may come; draws the router's own steps at once.
async function refresh(serial, changed) {
  const shown = opened.get(serial), row = requests.get(serial);
  if (!shown || !row) return;
  if (changed) drawDetail(serial);
  const settled = row.code && shown.finished;
  if (!row.handoff || settled || shown.asking || Date.now() - shown.asked < JOURNAL_MS) return;
  shown.asking = true;
  shown.asked = Date.now();
  const finished = row.code !== 0;
  try {
    shown.journal = await ask("/admin/live/" + row.handoff);
    shown.finished = finished;
    shown.error = "";
  } catch (error) {
    shown.error = `its daemons can't be asked: ${error.message}`;
  }
  shown.asking = false;
  if (opened.get(serial) === shown) drawDetail(serial);
}

function drawDetail(serial) {
  const row = requests.get(serial), shown = opened.get(serial), detail = items.get(serial).children[1];
  const daemons = shown.journal?.daemons ?? [];
  const facts = make("div", "facts");
  const told = [["model", row.model], ["path", row.path], ["prefill", row.prefill], ["decode", row.decode], ["way", row.way], ["not seeded", row.unseeded], ["handoff", row.handoff && `${row.handoff} ${row.outcome}`], ["reason", row.reason]];
  for (const [name, text] of told) if (text) facts.append(make("span", "", [make("b", "", [name]), text]));
  const scroll = detail.querySelector(".marks")?.scrollTop ?? 0;
  const complaints = [shown.error, ...daemons.map((d) => d.error && `${d.daemon}: ${d.error}`), ...daemons.map((d) => d.whole ? "" : `${d.daemon} remembers only the first of its layers`)].filter(Boolean);
  detail.replaceChildren(facts, ...complaints.map((text) => make("p", "bad", [text])), chart(row, daemons), markTable(row, daemons));
  detail.querySelector(".marks").scrollTop = scroll;
}

function chart(row, daemons) {
  const computed = daemons.flatMap((d) => d.computed), landed = daemons.flatMap((d) => d.landed);
  const end = endOf(row), pages = [...computed, ...landed];
  const layers = pages.reduce((most, [, layer]) => Math.max(most, layer + 1), 0);
  const calls = row.steps.filter(([what]) => /first_byte|decode_answered|prefill_answered|failed|broke/.test(what));
  // A long answer would press all that comes before it into a corner: the picture ends soon after the first byte.
  const reach = Math.max(...calls.map((step) => step[1]), ...(pages.length ? [pages.reduce((most, [at]) => Math.max(most, at), 0)] : []), 0);
  const until = reach && reach * 1.15 < end ? reach * 1.15 : Math.max(end, reach * 1.02);
  const box = make("div", "chart");
  const lane = (name, kinds) => {
    const line = make("div", "lane", segments(row, end).filter((s) => kinds.includes(s.kind) && s.from < until).map((s) => piece(`${s.kind} seg${s.failed ? " failed" : ""}`, s.from / until, (Math.min(s.to, until) - s.from) / until)));
    if (line.childElementCount) box.append(make("span", "", [name]), line);
  };
  lane(row.prefill ? `prefill ${row.prefill}` : "prefill", ["prefill"]);
  if (pages.length) {
    const picture = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    picture.setAttribute("viewBox", `0 0 1000 ${layers}`);
    picture.setAttribute("preserveAspectRatio", "none");
    picture.setAttribute("role", "img");
    picture.setAttribute("aria-label", layersInWords(computed, landed, layers));
    picture.style.height = Math.max(40, Math.min(180, layers * 6)) + "px";
    for (const [name, events] of [["computed", computed], ["landed", landed]]) {
      const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
      path.setAttribute("class", name);
      path.setAttribute("d", events.map(([at, layer]) => `M${(Math.max(0, at) / until * 1000).toFixed(2)} ${layer + .1}v.8`).join(""));
      picture.append(path);
    }
    box.append(make("span", "", [count(layers, "layer")]), picture);
    const key = make("span", "legend", [make("span", "", [make("i", "key prefill"), "computed, and saved"]), make("span", "", [make("i", "key wait"), "landed at decode"]), make("span", "", [layersInWords(computed, landed, layers)])]);
    box.append(make("span"), key);
  }
  lane(row.decode ? `decode ${row.decode}` : "decode", ["wait", "stream"]);
  const axis = make("div", "axis", [0, .25, .5, .75, 1].map((part) => {
    const label = make("b", "", [ms(until * part)]);
    label.style.left = part * 100 + "%";
    return label;
  }));
  box.append(make("span"), axis);
  return box;
}

function layersInWords(computed, landed, layers) {
  const ends = (events) => events.reduce(([a, b], [at]) => [Math.min(a, at), Math.max(b, at)], [Infinity, -Infinity]);
  const sum = (events) => number(events.reduce((n, [, , pages]) => n + pages, 0));
  const said = [["computed", computed], ["landed", landed]].filter(([, events]) => events.length);
  return said.map(([name, events]) => { const [a, b] = ends(events); return `${sum(events)} pages ${name} from ${ms(a)} to ${ms(b)}`; }).join("; ") + ` in ${count(layers, "layer")}`;
}

function markTable(row, daemons) {
  const marks = row.steps.map(([what, at, engine]) => [at, "router", what, engine ?? ""]);
  for (const d of daemons) for (const [what, at, text] of d.marks) marks.push([at, `${d.daemon} (${d.sides.join(", ")})`, what, text ?? ""]);
  marks.sort((a, b) => a[0] - b[0]);
  const body = make("tbody", "", marks.map(([at, where, what, text]) => make("tr", "", [make("td", "number", [ms(at)]), make("td", "", [where]), make("td", "", [WORDS[what] ?? what]), make("td", "", [text])])));
  const head = make("thead", "", [make("tr", "", ["At", "Where", "What", ""].map((name, at) => { const th = make("th", at ? "" : "number", [name]); th.scope = "col"; return th; }))]);
  const box = make("div", "scroll marks", [make("table", "", [head, body])]);
  box.tabIndex = 0;
  box.setAttribute("role", "region");
  box.setAttribute("aria-label", "steps of this request");
  const within = daemons.filter((d) => !d.error).map((d) => `±${ms(d.within_us)} for ${d.daemon}`);
  const words = within.length ? [make("p", "muted", [`Since the request's arrival, on the router's clock; daemons' times are placed by when they answered: ${within.join(", ")}.`])] : [];
  return make("div", "", [box, ...words]);
}

// --- drawing --------------------------------------------------------------------------------------------------------

function make(tag, kind = "", children = []) {
  const element = document.createElement(tag);
  if (kind) element.className = kind;
  element.append(...children);
  return element;
}

function set(element, text) {
  text = String(text);
  if (element.textContent !== text) element.textContent = text;
}

function bar(kinds) {
  const element = make("span", "bar", kinds.map((kind) => make("i", kind)));
  element.setAttribute("aria-hidden", "true");
  return element;
}

function parts(element, shares) {
  shares.forEach((share, at) => {
    const width = (100 * Math.min(1, Math.max(0, share))).toFixed(1) + "%";
    if (element.children[at].style.width !== width) element.children[at].style.width = width;
  });
}

function piece(kind, from, width) {
  const element = make("i", kind);
  element.style.left = (100 * Math.max(0, from)).toFixed(2) + "%";
  if (width) element.style.width = (100 * width).toFixed(2) + "%";
  return element;
}

// One child of `parent` for each thing, kept by key and in the order of `things`. Only what differs is touched.
function keyed(parent, things, keyOf, create, fill) {
  const known = parent.known ??= new Map(), wanted = new Set();
  let at = parent.firstChild;
  for (const thing of things) {
    const key = keyOf(thing);
    let element = known.get(key);
    if (!element) known.set(key, element = create(thing));
    wanted.add(key);
    fill(element, thing);
    if (element === at) at = at.nextSibling;
    else parent.insertBefore(element, at);
  }
  for (const [key, element] of known) if (!wanted.has(key)) { element.remove(); known.delete(key); }
}

const number = (n) => n.toLocaleString("en");
const count = (n, one, many = one + "s") => `${number(n)} ${n === 1 ? one : many}`;
const percent = (share) => `${Math.round(share * 100)} %`;
const clock = (when, exact) => when.toLocaleTimeString("en-GB") + (exact ? "." + String(when.getMilliseconds()).padStart(3, "0") : "");

function ms(us) {
  const value = us / 1000;
  return Math.abs(value) >= 10000 ? `${(value / 1000).toFixed(1)} s` : `${value.toFixed(Math.abs(value) < 10 ? 2 : Math.abs(value) < 100 ? 1 : 0)} ms`;
}

function span(s) {
  if (s < 120) return `${s < 10 ? s.toFixed(1) : Math.round(s)} s`;
  return s < 7200 ? `${Math.round(s / 60)} min` : s < 172800 ? `${Math.round(s / 3600)} h` : `${Math.round(s / 86400)} d`;
}

function bytes(n) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  while (n >= 1024 && at < units.length - 1) { n /= 1024; at++; }
  return `${at && n < 10 ? n.toFixed(1) : Math.round(n)} ${units[at]}`;
}

poll();
