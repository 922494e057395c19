"use strict";
/* The page for people: no build step, no library. Everything from the service becomes text by
   textContent or createTextNode; nothing is ever parsed as HTML. The place in the page is the hash:
   #/search/TEXT, #/item/ID, #/user/ID, #/model, each with ?f.COLUMN=VALUE, r.COLUMN=FROM..TO,
   diversity, popularity, exact and seen. */

(() => {
  // --- colours, before the first paint ----------------------------------------------------------
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const stored = {
    get() { try { return localStorage.getItem("theme"); } catch { return null; } },
    set(theme) { try { localStorage.setItem("theme", theme); } catch { /* private windows */ } },
  };
  const isDark = () => (stored.get() ?? (dark.matches ? "dark" : "light")) === "dark";
  function paint() {
    const theme = stored.get();
    if (theme) document.documentElement.dataset.theme = theme;
    document.getElementById("theme")?.setAttribute("aria-pressed", String(isDark()));
  }
  paint();
  dark.addEventListener("change", paint);

  // --- small tools --------------------------------------------------------------------------------
  const $ = (id) => document.getElementById(id);
  const PAGE = 12, MORE_CHIPS = 6, PAST = 10, WAIT = 140;

  /** An element; strings among the children become text. */
  function h(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value === null || value === undefined || value === false) continue;
      if (name === "on") for (const [type, call] of Object.entries(value)) element.addEventListener(type, call);
      else if (name === "share") element.style.setProperty("--share", value);
      else element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
    return element;
  }
  const track = (share, kind = "") =>
    h("span", { class: `track ${kind}`, "aria-hidden": "true" }, h("i", { share: Math.min(1, Math.max(0, share || 0)).toFixed(3) }));
  const whole = new Intl.NumberFormat("en");
  const brief = new Intl.NumberFormat("en", { maximumFractionDigits: 4 });
  // Popular items have counts, everything else an inner product.
  const score = (value) => (!Number.isFinite(value) ? "–" : Math.abs(value) > 1 && Number.isInteger(value) ? whole.format(value) : value.toFixed(3));
  const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(3)}`;
  const DAY = /^\d{4}-\d\d-\d\d$/, MOMENT = /^\d{4}-\d\d-\d\dT\d\d:\d\d/;
  const day = (date) => date.toLocaleDateString("en", { day: "numeric", month: "short", year: "numeric", timeZone: "UTC" });
  const moment = (date) => `${day(date)}, ${date.toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit", timeZone: "UTC" })}`;
  const micro = (time) => new Date(time / 1000);
  function said(value) {
    if (Array.isArray(value)) return value.map(said).join(", ");
    if (value === true) return "yes";
    if (value === false) return "no";
    if (typeof value === "number") return brief.format(value);
    if (value !== null && typeof value === "object") return JSON.stringify(value);
    if (DAY.test(value)) return day(new Date(value));
    if (MOMENT.test(value)) return day(new Date(value));
    return String(value);
  }
  const filled = (value) => value !== null && value !== undefined && value !== "" && !(Array.isArray(value) && !value.length);
  const words = (name) => String(name).replaceAll("_", " ");
  const link = (kind, id) => `#/${kind}/${encodeURIComponent(id)}`;
  const tell = (text) => { $("said").textContent = text; };

  // --- the service --------------------------------------------------------------------------------
  let key = null; // in memory only

  class Refused extends Error {
    constructor(code, message, status, request) { super(message); Object.assign(this, { code, status, request }); }
  }
  async function call(method, path, body, signal) {
    // Who looks at this page is no user: what they are shown must not teach the next model.
    const headers = { Accept: "application/json", "X-Exposure": "none" };
    if (body) headers["Content-Type"] = "application/json";
    if (key) headers.Authorization = `Bearer ${key}`;
    let response;
    try {
      response = await fetch(path, { method, headers, body: body && JSON.stringify(body), signal, cache: "no-store", credentials: "omit" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refused("unreachable", "The service cannot be reached. Is it running?");
    }
    let answer = null;
    try { answer = await response.json(); } catch (error) { if (error.name === "AbortError") throw error; }
    if (response.ok && answer) return answer;
    const error = answer?.error ?? {};
    throw new Refused(error.code ?? "bad_answer", error.message ?? `The service answered with status ${response.status}.`, response.status, error.request_id);
  }
  const getItem = async (id, signal) => (await call("GET", `/v1/items/${encodeURIComponent(id)}`, null, signal)).item;
  const getUser = async (id, signal) => (await call("GET", `/v1/users/${encodeURIComponent(id)}`, null, signal)).user;
  const ask = async (route, question, signal) => ({ ...(await call("POST", `/v1/${route}`, question, signal)), paged: Boolean(question.paged) });

  // --- where we are -------------------------------------------------------------------------------
  function place() {
    const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
    const [view, ...rest] = path.split("/");
    let what = rest.join("/");
    try { what = decodeURIComponent(what); } catch { /* a stray % stands for itself */ }
    const known = ["search", "item", "user"].includes(view) && what ? view : view === "model" ? "model" : "home";
    return { view: known, what, options: new URLSearchParams(query) };
  }
  function address(view, what, options) {
    const path = view === "home" ? "" : what ? `${view}/${encodeURIComponent(what)}` : view;
    const query = options.toString();
    return `#/${path}${query ? `?${query}` : ""}`;
  }
  /** The same question with other options, or another text; the way back is kept short. */
  function replace(view, what, options) {
    history.replaceState(null, "", address(view, what, options));
    show(false);
  }
  function filterOf(options) {
    const equals = {}, ranges = {};
    for (const [name, value] of options) {
      if (name.startsWith("f.")) (equals[name.slice(2)] ??= []).push(typed(name.slice(2), value));
      if (name.startsWith("r.")) {
        const bounds = value.split("..").map((bound, last) => bounded(name.slice(2), bound.trim(), last));
        if (bounds.length === 2 && bounds.some((bound) => bound !== null)) ranges[name.slice(2)] = bounds;
      }
    }
    return Object.keys(equals).length + Object.keys(ranges).length ? { equals, ranges } : null;
  }
  /** A bound as the service takes it: a number, or a day as seconds, the last one to its end. */
  function bounded(name, text, last) {
    const time = columns.get(name)?.kind === "time";
    const value = text === "" ? NaN : time ? Date.parse(text) / 1000 + (last ? 86399.999999 : 0) : Number(text);
    return Number.isFinite(value) ? value : null;
  }
  /** What the questions of all views share. */
  function common(options, more = {}) {
    const dial = (name, least) => Math.min(1, Math.max(least, Number(options.get(name)) || 0));
    const diversity = dial("diversity", 0), popularity = dial("popularity", -1);
    // Dials choose from a pool, which has no pages: "more" then asks for a longer list.
    const question = { k: PAGE, fields: ["*"], ...(diversity || popularity ? { diversity, popularity } : { paged: true }), ...more };
    if (options.has("exact")) question.exact = true;
    const filter = filterOf(options);
    if (filter) question.filter = filter;
    return question;
  }

  // --- what is known of the catalogue ---------------------------------------------------------------
  let facts = [];
  const columns = new Map(); // name → { kind: "number" | "time" | "yes" | "words", values: Set }

  const has = (what) => facts.length === 0 || facts.some((model) => model[what] !== false);
  const typed = (name, value) => {
    const column = columns.get(name);
    if (column?.kind === "yes") return value === "true";
    if (column?.kind === "number" && value !== "" && Number.isInteger(Number(value))) return Number(value);
    return value;
  };
  /** Values that answers show; which columns there are, the model says. */
  function learn(fields) {
    let grown = false;
    for (const [name, value] of Object.entries(fields ?? {})) {
      const column = columns.get(name);
      if (!column) continue;
      for (const one of Array.isArray(value) ? value : [value]) {
        if (column.kind === "words" && typeof one === "string" && one.length <= 40 && column.values.size < 200 && !column.values.has(one)) {
          column.values.add(one);
          grown = true;
        }
      }
    }
    if (grown) drawFilters();
  }
  function learnFacts() {
    for (const model of facts) {
      for (const [name, type] of Object.entries(model.fields ?? {})) {
        const kind = /^(U?Int|Float|Decimal)/.test(type) ? "number" : /^Date/.test(type) ? "time" : /^Bool/.test(type) ? "yes" : /^(String|Categorical|Enum|List\(String)/.test(type) ? "words" : null;
        if (kind && name !== "title" && !columns.has(name)) columns.set(name, { kind, values: new Set() });
        if (!model.values?.[name] || !columns.has(name)) continue;
        columns.get(name).told = true;
        for (const value of model.values[name]) columns.get(name).values.add(value);
      }
    }
    drawFilters();
  }

  // --- filters and dials ----------------------------------------------------------------------------
  function change(edit) {
    const { view, what, options } = place();
    edit(options);
    replace(view, what, options);
  }
  function toggle(name, value) {
    change((options) => {
      const values = options.getAll(name);
      options.delete(name);
      for (const one of values.includes(value) ? values.filter((v) => v !== value) : [...values, value]) options.append(name, one);
    });
  }
  /** A column's controls, made once: what is drawn anew would lose the focus. */
  function fieldOf(name, column) {
    const label = h("span", { class: "label" }, words(name));
    const make = (...children) => h("div", { class: "field", role: "group", "aria-label": words(name) }, label, ...children);
    if (column.kind === "number" || column.kind === "time") {
      column.bounds = ["from", "to"].map((which) => h("input", {
        type: column.kind === "time" ? "date" : "number", step: "any", "data-name": `r.${name}`, on: { change: () => setRange(name, column) } }));
      return make(h("div", { class: `range ${column.kind}` }, column.bounds.map((input, i) =>
        h("label", {}, h("span", { class: "hidden" }, words(name)), h("span", { class: "which" }, i ? " to " : " from "), input))));
    }
    column.chips = h("div", { class: "chips" });
    column.buttons = new Map();
    if (column.kind === "yes") return make(column.chips);
    const id = `list-${name}`;
    column.options = h("datalist", { id });
    column.other = h("input", { type: "text", list: id, "aria-label": `${words(name)}: another value`, maxlength: 200, "data-name": `f.${name}`, on: { change: addValue } });
    return make(column.chips, column.other, column.options);
  }
  function drawFilters() {
    const { options } = place();
    const box = $("filters");
    for (const [name, column] of columns) {
      if (!column.field) box.append(column.field = fieldOf(name, column));
      if (column.bounds) {
        const said = (options.get(`r.${name}`) ?? "").split("..");
        column.bounds.forEach((input, i) => { if (document.activeElement !== input) input.value = said[i] ?? ""; });
      } else drawChips(name, column, options.getAll(`f.${name}`));
    }
    box.hidden = !columns.size;
  }
  function drawChips(name, column, chosen) {
    const known = column.kind === "yes" ? ["true", "false"] : [...column.values].map(String);
    const all = [...new Set([...chosen, ...known])];
    // Chosen ones stay where they are as long as there is room for all.
    const few = all.length <= MORE_CHIPS ? [...new Set([...known, ...chosen])] : all.slice(0, Math.max(chosen.length, MORE_CHIPS));
    const buttons = few.map((value) => {
      if (!column.buttons.has(value)) {
        const text = column.kind === "yes" ? (value === "true" ? "yes" : "no") : value;
        column.buttons.set(value, h("button", { type: "button", class: "chip", "data-name": `f.${name}`, "data-value": value, on: { click: () => toggle(`f.${name}`, value) } }, text));
      }
      const button = column.buttons.get(value);
      button.setAttribute("aria-pressed", String(chosen.includes(value)));
      return button;
    });
    if (buttons.length !== column.chips.children.length || buttons.some((button, i) => button !== column.chips.children[i])) {
      const kept = document.activeElement;
      column.chips.replaceChildren(...buttons);
      if (buttons.includes(kept)) kept.focus();
    }
    if (!column.other) return;
    column.other.hidden = column.told && known.length <= MORE_CHIPS; // else there may be others
    column.other.placeholder = known.length ? "another …" : "any value";
    if (column.options.children.length !== known.length) column.options.replaceChildren(...known.map((value) => h("option", { value })));
  }
  function setRange(name, column) {
    const [from, to] = column.bounds.map((input) => input.value.trim());
    change((options) => (from || to ? options.set(`r.${name}`, `${from}..${to}`) : options.delete(`r.${name}`)));
  }
  function addValue(event) {
    const value = event.target.value.trim();
    event.target.value = "";
    if (value && !place().options.getAll(event.target.dataset.name).includes(value)) toggle(event.target.dataset.name, value);
  }
  function drawDials() {
    const { view, options } = place();
    for (const name of ["diversity", "popularity"]) {
      const value = Number(options.get(name)) || 0;
      if (document.activeElement !== $(name)) $(name).value = value;
      const text = value === 0 ? "off" : name === "popularity" && value > 0 ? `+${value}` : String(value).replace("-", "−");
      $(`${name}-said`).textContent = text;
      $(name).setAttribute("aria-valuetext", text);
    }
    $("exact").checked = options.has("exact");
    $("seen").checked = options.has("seen");
    $("seen-row").hidden = view !== "user";
    const count = new Set(options.keys()).size;
    $("active").hidden = !count;
    $("active").textContent = count ? `${count} set` : "";
    $("reset").hidden = !count;
  }

  // --- why an answer stands where it stands ---------------------------------------------------------
  const PARTS = { id: "who chose it", text: "its text", vector: "its given vector", statistics: "how it did lately" };
  const LEAST = 0.0005;
  /** { name, value, id? } of an explanation, strongest first: what the score would lack without it. */
  function reasons(explanation, titles) {
    const parts = Object.entries(explanation?.parts ?? {}).map(([name, value]) => ({ name: PARTS[name] ?? `its ${words(name)}`, value }));
    const past = new Map(); // an item that was chosen twice stands twice
    for (const { id, pull } of explanation?.history ?? []) past.set(id, Math.max(pull, past.get(id) ?? pull));
    for (const [id, value] of past) parts.push({ name: titles?.get(id) ?? id, value, id });
    return parts.filter((part) => Math.abs(part.value) >= LEAST).sort((a, b) => Math.abs(b.value) - Math.abs(a.value));
  }
  const list = (names) => (names.length > 1 ? `${names.slice(0, -1).join(", ")} and ${names.at(-1)}` : names[0]);
  /** The reason in words, and small bars behind it. */
  function why(item, titles, open) {
    const parts = reasons(item.explanation, titles);
    const shared = Object.entries(item.explanation?.shared ?? {}).filter(([name]) => name !== "title").map(([name, value]) => `${words(name)} ${said(value)}`);
    if (!parts.length && !shared.length) return null;
    const pulls = parts.filter((part) => part.value > 0), past = pulls.filter((part) => part.id !== undefined);
    const lead = past.length ? `Because of ${list(past.slice(0, 2).map((part) => part.name))}`
      : pulls.length ? `Mostly for ${list(pulls.slice(0, 2).map((part) => part.name))}` : "Nothing speaks for it alone";
    const row = (most) => ({ name, value, id }) => [
      h("dt", { title: name }, id === undefined ? name : h("a", { href: link("item", id) }, name)),
      h("dd", {}, track(Math.abs(value) / most, value < 0 ? "against" : ""),
        h("span", { class: "much" }, signed(value), h("span", { class: "hidden" }, value < 0 ? " against it" : " for it"))),
    ];
    const group = (head, some) => (some.length ? [h("p", { class: "of" }, head), h("dl", { class: "pulls" }, some.slice(0, 6).map(row(Math.abs(some[0].value))))] : []);
    return h("details", { class: "why", open },
      h("summary", {}, shared.length ? `${lead}; shares ${list(shared.slice(0, 3))}` : lead),
      group("Score gained by what was chosen before", parts.filter((part) => part.id !== undefined)),
      group("Score gained by what is known of the item", parts.filter((part) => part.id === undefined)));
  }

  // --- pieces of views --------------------------------------------------------------------------------
  const titleOf = (id, fields) => (filled(fields?.title) ? String(fields.title) : id);
  const tags = (id, fields) => h("div", { class: "tags" }, fields?.title ? h("span", { class: "id" }, id) : null,
    Object.entries(fields ?? {}).filter(([name, value]) => name !== "title" && filled(value)).slice(0, 6).map(([name, value]) =>
      h("span", {}, h("span", { class: "hidden" }, `${words(name)}: `), typeof value === "number" || typeof value === "boolean" ? `${words(name)} ${said(value)}` : said(value))));

  function result(item, rank, best, titles, open = false) {
    return h("li", {}, h("div", { class: "result" },
      h("span", { class: "rank", "aria-hidden": "true" }, String(rank)),
      h("div", {}, h("div", { class: "title" }, h("a", { href: link("item", item.id) }, titleOf(item.id, item.fields))), tags(item.id, item.fields)),
      h("div", { class: "score" }, h("span", { class: "hidden" }, "score "), score(item.score), track(item.score / best)),
      why(item, titles, open)));
  }
  const ghosts = () => h("div", { class: "card", "aria-hidden": "true" }, [1, 2, 3, 4].map(() => h("div", { class: "ghost" }, h("i"), h("i"))));
  const nothing = (title, text) => h("div", { class: "card nothing" }, h("strong", {}, title), h("span", {}, text));

  /** A list of answers that grows by "more"; `again(change)` asks for the next page. */
  function answers(label, answer, again, { titles, empty, note = true } = {}) {
    const part = h("section", { class: "part", "aria-label": label });
    part.append(h("div", { class: "part-head" }, h("h2", {}, label), answer.model ? h("span", { class: "muted small" }, `${answer.variant ? `variant ${answer.variant} · ` : ""}model ${answer.model}`) : null));
    if (answer.fallback && note) part.append(h("p", { class: "note" }, sentence(answer.fallback)));
    for (const item of answer.items) learn(item.fields);
    if (!answer.items.length) {
      part.append(nothing("Nothing found", empty ?? "Loosen the filters, or ask for something else."));
      return part;
    }
    const best = Math.max(...answer.items.map((item) => item.score ?? 0)) || 1;
    const rows = h("ol", { class: "card results" }, answer.items.map((item, i) => result(item, i + 1, best, titles, i === 0)));
    part.append(rows);
    const grown = answer.items.length >= PAGE && !answer.paged;
    if (answer.next || grown) {
      const button = h("button", { type: "button", class: "quiet more", on: { click: async () => {
        button.disabled = true;
        const from = rows.children.length;
        const more = await attempt(() => again(answer.next ? { cursor: answer.next } : { k: from + PAGE }));
        button.disabled = false;
        if (!more) return;
        for (const item of more.items) learn(item.fields);
        // A longer list from a pool may be ordered otherwise from the first place on.
        if (!answer.next) rows.replaceChildren();
        const before = rows.children.length;
        rows.append(...more.items.map((item, i) => result(item, before + i + 1, best, titles)));
        answer = { ...more, paged: answer.paged };
        if (answer.paged ? !answer.next : rows.children.length < from + PAGE) button.remove();
        (rows.children[from] ?? rows.lastElementChild).querySelector("a").focus();
        tell(`${rows.children.length - from} more, ${rows.children.length} in all`);
      } } }, "More");
      part.append(button);
    }
    return part;
  }
  const sentence = (text) => `${text.charAt(0).toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}`;

  // --- asking, and what can go wrong --------------------------------------------------------------------
  let running = null, asked = 0;

  function complain(error) {
    if (error.status === 401) {
      $("key-form").hidden = false;
      $("view").replaceChildren();
      complainOf(key ? "This key is not valid." : null);
      key = null;
      $("key").focus();
      return;
    }
    if (error.code === "stale_cursor") complainOf("The model was replaced while you read. The list begins anew.", "Begin anew");
    else complainOf(error.message, "Try again", error.request);
  }
  function complainOf(text, button, request) {
    $("alert").replaceChildren();
    if (!text) return;
    $("alert").append(h("span", {}, text, request ? h("span", { class: "small" }, ` (request ${request})`) : null));
    if (button) $("alert").append(h("button", { type: "button", on: { click: () => show(false) } }, button));
  }
  /** What `work` gives, or null after telling what went wrong; only the newest may show itself. */
  async function attempt(work) {
    const mine = ++asked;
    $("loading").hidden = false;
    try {
      const done = await work();
      if (mine === asked) complainOf(null);
      return mine === asked ? done : null;
    } catch (error) {
      if (error.name !== "AbortError" && mine === asked) {
        if (!(error instanceof Refused)) throw error;
        complain(error);
        tell("");
      }
      return null;
    } finally {
      if (mine === asked) { $("loading").hidden = true; $("view").removeAttribute("aria-busy"); }
    }
  }

  // --- views ------------------------------------------------------------------------------------------
  const views = {
    async home(_, options, signal) {
      const question = common(options, { history: [] });
      const answer = await ask("recommendations", question, signal);
      document.title = "recsys";
      return [
        h("div", { class: "head" }, h("h1", {}, "What are you looking for?"),
          h("p", { class: "muted" }, has("text") ? "Type a few words above, or the id of an item or a user." : "Type the id of an item or a user above.")),
        answers("Popular now", answer, (next) => ask("recommendations", { ...question, ...next }), { note: false }),
      ];
    },

    async search(text, options, signal) {
      document.title = `${text} · recsys`;
      const one = /^\S{1,256}$/.test(text);
      const quiet = (promise) => promise.catch((error) => { if (error.name === "AbortError" || error.status === 401) throw error; return null; });
      const question = common(options, { text });
      const [item, user, answer] = await Promise.all([
        one ? quiet(getItem(text, signal)) : null,
        one ? quiet(getUser(text, signal)) : null,
        has("text") ? ask("search", question, signal).catch((error) => {
          // No text, or no known word in it: an id may still be meant.
          if (error.code !== "bad_query") throw error;
          return { items: [], refused: error.message };
        }) : null,
      ]);
      const opens = [
        item ? h("a", { href: link("item", text) }, `Item ${titleOf(text, item.fields ?? item)} →`) : null,
        user && user.known !== false ? h("a", { href: link("user", text) }, `User ${text} →`) : null,
      ].filter(Boolean);
      const out = [h("h1", { class: "hidden" }, `Search for ${text}`)];
      if (opens.length) out.push(h("nav", { class: "opens", "aria-label": "Known under this id" }, opens));
      if (answer) out.push(answers(`Items for “${text}”`, answer, (next) => ask("search", { ...question, ...next }), { empty: answer.refused }));
      else if (!opens.length) out.push(nothing("No such id", "This model was trained without item text, so only ids of items and users can be looked up."));
      return out;
    },

    async item(id, options, signal) {
      const question = common(options, { items: [id], explain: true });
      const [about, answer] = await Promise.all([getItem(id, signal), ask("similar", question, signal)]);
      const fields = about.fields ?? about;
      learn(fields);
      const title = titleOf(id, fields);
      document.title = `${title} · recsys`;
      const shown = Object.entries(fields).filter(([name, value]) => !["title", "id", "item"].includes(name) && filled(value) && typeof value !== "object" || Array.isArray(value) && value.length);
      return [
        h("div", { class: "head" }, h("h1", { tabindex: "-1" }, title), h("p", {}, "Item ", h("span", { class: "id" }, id))),
        shown.length ? h("dl", { class: "card facts" }, shown.map(([name, value]) => [h("dt", {}, words(name)), h("dd", {}, said(value))])) : null,
        answers("Similar items", answer, (next) => ask("similar", { ...question, ...next })),
      ];
    },

    async user(id, options, signal) {
      const question = common(options, { user: id, explain: true, drop_seen: !options.has("seen") });
      const [user, answer] = await Promise.all([getUser(id, signal), ask("recommendations", question, signal)]);
      document.title = `User ${id} · recsys`;
      const past = pastOf(user);
      const titles = await titlesOf(past, answer, signal);
      const history = h("section", { class: "part history", "aria-label": "History" },
        h("div", { class: "part-head" }, h("h2", {}, "History"), h("span", { class: "muted small" }, past.length ? "newest first" : "")),
        past.length ? h("ol", { class: "card results" }, past.map((one, i) => h("li", { "data-id": one.id, hidden: i >= PAST }, h("div", { class: "result" },
          h("div", { class: "title" }, h("a", { href: link("item", one.id) }, titles.get(one.id) ?? one.id)),
          h("div", { class: "tags" }, titles.has(one.id) ? h("span", { class: "id" }, one.id) : null,
            one.time ? h("span", {}, moment(micro(one.time))) : null, one.event ? h("span", {}, one.event) : null))))) : nothing("No history", "Nothing is known of what this user did."),
        past.length > PAST ? h("button", { type: "button", class: "quiet more", on: { click: (event) => {
          for (const row of history.querySelectorAll("li[hidden]")) row.hidden = false;
          history.querySelectorAll("li a")[PAST].focus();
          event.target.remove();
        } } }, `All ${past.length}`) : null);
      const found = answers("Recommendations", answer, (next) => ask("recommendations", { ...question, ...next }), { titles });
      const pulls = new Map(answer.items.map((item) => [item.id, new Set(reasons(item.explanation).filter((part) => part.value > 0 && part.id !== undefined).slice(0, 3).map((part) => part.id))]));
      const light = (event) => {
        const at = event.target.closest?.(".results > li");
        const strong = event.type === "focusout" || event.type === "pointerleave" || !at ? null : pulls.get(decodeURIComponent(at.querySelector("a").hash.slice(7)));
        for (const row of history.querySelectorAll("li")) row.classList.toggle("strong", Boolean(strong?.has(row.dataset.id)));
      };
      for (const type of ["pointerover", "pointerleave", "focusin", "focusout"]) found.addEventListener(type, light);
      return [
        h("div", { class: "head" }, h("h1", { tabindex: "-1" }, `User ${id}`), h("p", { class: "muted" }, user.known === false ? "Not known to this model." : "What was chosen so far, and what the model would show next.")),
        h("div", { class: "both" }, history, found),
      ];
    },

    async model() {
      await load();
      document.title = "Model · recsys";
      return [
        h("div", { class: "head" }, h("h1", { tabindex: "-1" }, facts.length > 1 ? "Models" : "Model"), h("p", { class: "muted" }, "What answers here, and what it knows.")),
        ...facts.map((model) => h("section", { class: "part", "aria-label": `Variant ${model.name ?? model.variant ?? ""}` },
          facts.length > 1 ? h("h2", {}, `Variant ${model.name ?? model.variant}`) : null,
          h("dl", { class: "facts-grid" }, factsOf(model).map(([name, value]) => h("div", { class: `card fact${String(value).length > 30 ? " long" : ""}` }, h("dt", {}, name), h("dd", {}, value)))))),
      ];
    },
  };

  /** What the user did, newest first; what was posted since the model was made is marked. */
  function pastOf(user) {
    const posted = new Set((user.events ?? []).map((one) => `${one.id} ${one.time}`));
    return (user.history ?? []).map((one) => ({ ...one, event: posted.has(`${one.id} ${one.time}`) ? "posted since" : null })).reverse();
  }
  /** id → title, from what was answered already; the rest is looked up, a few at a time. */
  async function titlesOf(past, answer, signal) {
    const titles = new Map();
    for (const one of [...past, ...answer.items]) if (filled(one.fields?.title ?? one.title)) titles.set(one.id, String(one.fields?.title ?? one.title));
    const rest = [...new Set(past.map((one) => one.id))].filter((id) => !titles.has(id)).slice(0, 60);
    const look = async () => {
      for (let id = rest.shift(); id !== undefined; id = rest.shift()) {
        try {
          const about = await getItem(id, signal), fields = about.fields ?? about;
          if (filled(fields.title)) titles.set(id, String(fields.title));
        } catch (error) { if (error.name === "AbortError") throw error; }
      }
    };
    await Promise.all([look(), look(), look(), look()]);
    return titles;
  }

  // --- facts ------------------------------------------------------------------------------------------
  function factsOf(model) {
    const out = [];
    const put = (name, value, form = said) => { if (filled(value)) out.push([name, form(value)]); };
    put("Version", model.version);
    put("Knows events until", model.cutoff, (time) => (typeof time === "number" ? moment(micro(time)) : said(time)));
    const count = (n) => whole.format(n), percent = (share) => `${(100 * share).toFixed(1)} %`;
    put("Items", model.items, count);
    put("Searchable now", model.answerable ?? model.indexed, count);
    put("Users", model.users, count);
    put("Came since", model.live_items, count);
    put("Users with new events", model.users_with_events, count);
    put("Index", model.index);
    put(`Recall of the index${model.recall_k ? ` at ${model.recall_k}` : ""}`, model.recall, percent);
    put("Neighbours kept of each item", model.neighbours?.k, count);
    put("Recall of neighbours", model.neighbours?.recall, percent);
    put("Dimensions", model.dimension);
    put("Score", model.score, words);
    put("Share of users", model.share, (share) => `${Math.round(100 * share)} %`);
    put("Loaded", model.loaded_at, (time) => (typeof time === "number" ? moment(new Date(time < 1e11 ? time * 1000 : time / 1000)) : moment(new Date(time))));
    put("Swaps", model.swaps);
    put("Failed loads", model.failures);
    put("Reads", [model.text && "text", model.statistics && "statistics of items", model.context?.length && `context (${model.context.join(", ")})`].filter(Boolean), said);
    put("Last error", model.last_error);
    return out;
  }
  async function load() {
    facts = ((await call("GET", "/v1/model")).models ?? []).map((model) => ({ ...model, ...model.engine, engine: undefined }));
    learnFacts();
    const first = facts[0];
    $("facts").textContent = first ? facts.map((model) => [`${facts.length > 1 ? `${model.name}: ` : ""}model ${model.version}`,
      filled(model.items) ? `${whole.format(model.items)} items` : null,
      typeof model.cutoff === "number" ? `knows events until ${day(micro(model.cutoff))}` : null].filter(Boolean).join(" · ")).join("  |  ") : "";
    $("query").placeholder = has("text") ? "Search items, or type an id" : "The id of an item or a user";
  }

  // --- showing ----------------------------------------------------------------------------------------
  let last = null;

  async function show(moved = true) {
    const { view, what, options } = place();
    running?.abort();
    running = new AbortController();
    const { signal } = running;
    const query = $("query");
    if (document.activeElement !== query || view === "search") {
      const text = view === "search" ? what : "";
      if (query.value.trim() !== text) query.value = text;
    }
    document.querySelector(".page").classList.toggle("wide", view === "model");
    for (const one of document.querySelectorAll(".links a")) {
      const here = one.dataset.view === view || (one.dataset.view === "home" && view !== "model");
      if (here) one.setAttribute("aria-current", view === one.dataset.view ? "page" : "true"); else one.removeAttribute("aria-current");
    }
    $("key-form").hidden = true;
    drawDials();
    drawFilters();
    // Another question of the same kind leaves the old answers in sight until the new ones come.
    const kind = view === "search" || view === "home" ? "list" : `${view} ${what}`;
    if (kind !== last) { $("view").replaceChildren(view === "model" ? "" : ghosts()); if (moved) window.scrollTo(0, 0); }
    $("view").setAttribute("aria-busy", "true");
    const parts = await attempt(async () => {
      if (!facts.length && view !== "model") await load();
      return views[view](what, options, signal);
    });
    if (!parts) { if (!$("alert").hasChildNodes()) return; if (kind !== last) $("view").replaceChildren(); last = null; return; }
    const kept = document.activeElement;
    const inView = $("view").contains(kept);
    $("view").replaceChildren(...parts.filter(Boolean));
    const count = $("view").querySelectorAll(".part:not(.history) .results > li").length;
    tell(view === "model" ? "Facts of the model" : `${count} item${count === 1 ? "" : "s"}`);
    if ((moved && kind !== last && last !== null && kept !== query) || inView) $("view").querySelector("h1[tabindex]")?.focus({ preventScroll: true });
    last = kind;
  }

  // --- keys and clicks ----------------------------------------------------------------------------------
  function keys(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const at = document.activeElement, query = $("query");
    const typing = at.matches("input:not([type=checkbox]):not([type=range]), textarea, select");
    if (event.key === "/" && !typing) { event.preventDefault(); query.focus(); query.select(); return; }
    if (event.key === "Escape") {
      if (at === $("key")) return;
      event.preventDefault();
      query.value = "";
      query.focus();
      if (place().view === "search") replace("home", "", place().options);
      return;
    }
    const links = [...document.querySelectorAll("#view .opens a, #view .results > li:not([hidden]) .title a")];
    const open = at.closest?.("#view .results > li")?.querySelector(".title a");
    const index = links.indexOf(links.includes(at) ? at : open);
    const from = index >= 0 || at === query || at === document.body || at === $("content") || at.matches("#view h1");
    if (!from || !links.length) return;
    let to = null;
    if (event.key === "ArrowDown") to = index + 1;
    else if (event.key === "ArrowUp" && index >= 0) to = index - 1;
    else if (event.key === "Home" && index >= 0) to = 0;
    else if (event.key === "End" && index >= 0) to = links.length - 1;
    if (to === null) return;
    event.preventDefault();
    if (to < 0) query.focus();
    else links[Math.min(to, links.length - 1)].focus();
  }

  function start() {
    paint();
    const query = $("query");
    const narrow = window.matchMedia("(max-width: 60rem)");
    $("controls").open = !narrow.matches;
    narrow.addEventListener("change", () => { $("controls").open = !narrow.matches; });
    $("theme").addEventListener("click", () => { stored.set(isDark() ? "light" : "dark"); paint(); });

    let timer = 0;
    const search = () => {
      clearTimeout(timer);
      const text = query.value.trim(), { view, what, options } = place();
      if (!text) { if (view === "search") replace("home", "", options); return; }
      if (view === "search" && text === what) return;
      if (view === "search") replace("search", text, options);
      else location.hash = address("search", text, options);
    };
    query.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(search, WAIT); });
    $("find").addEventListener("submit", (event) => { event.preventDefault(); search(); });

    for (const name of ["diversity", "popularity"]) {
      $(name).addEventListener("input", () => {
        clearTimeout(timer);
        const value = Number($(name).value);
        $(`${name}-said`).textContent = value === 0 ? "off" : String(value).replace("-", "−");
        timer = setTimeout(() => change((options) => (value ? options.set(name, String(value)) : options.delete(name))), WAIT);
      });
    }
    for (const name of ["exact", "seen"]) {
      $(name).addEventListener("change", () => change((options) => ($(name).checked ? options.set(name, "1") : options.delete(name))));
    }
    $("options").addEventListener("submit", (event) => event.preventDefault());
    $("options").addEventListener("reset", (event) => {
      event.preventDefault();
      const { view, what } = place();
      $("controls").querySelector("summary").focus();
      replace(view, what, new URLSearchParams());
    });
    $("key-form").addEventListener("submit", (event) => {
      event.preventDefault();
      key = $("key").value.trim();
      $("key").value = "";
      show(false);
    });
    $("skip").addEventListener("click", (event) => { event.preventDefault(); $("content").focus(); });
    document.addEventListener("keydown", keys);
    window.addEventListener("hashchange", () => show());
    show();
  }
  document.addEventListener("DOMContentLoaded", start);
})();
