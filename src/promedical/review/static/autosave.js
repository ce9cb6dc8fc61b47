/* Keeps what a reviewer writes: nothing is lost to a reload, a crash, or a lost connection.
 *
 *   page ── changed() ──> Autosave ── journal (this browser, at once) ──> store (server or file)
 *
 * Every attempt to save has an id that it keeps however often it is retried, so a retry after a lost
 * reply changes nothing. An entry leaves the journal only when the store has acknowledged it; a page
 * that opens takes over what a closed or killed page of the same item left there. If the store has
 * another version than the one this page began from, both are shown and the person chooses.
 *
 * A classic script without imports, so that the offline pack can hold it in one file. It defines
 * `window.Review`: Autosave, OnlineStore, OfflineStore, Journal, ActiveTime, deliverLeftovers, words,
 * same, newId. Left to others: what an answer is and how it is shown; two versions (`versions.js`).
 */
"use strict";

(() => {
  const Review = (window.Review = window.Review || {});
  const SAVE_DELAY = 1000; // ms after the last change until it is sent
  const LONGEST_DELAY = 5000; // ms after the first unsent change, however fast a person types
  const RETRY = [1000, 2000, 4000, 8000, 15000, 30000];
  const LONGEST_TAKE = 3600; // seconds; the server takes no more for one save
  const TIMEOUT = 15000;
  const DAY = 86400000;
  const KEEPALIVE_LIMIT = 60000; // bytes that a browser sends on from a page that is closing

  /* A text of the interface: `data-*` of #review-words or of what has the attribute
   * data-review-words, so that scripts hold no language. */
  Review.words = (name, values = {}) => {
    let text = name;
    for (const holder of document.querySelectorAll("#review-words, [data-review-words]")) {
      if (holder.dataset[name] !== undefined) text = holder.dataset[name];
    }
    for (const [key, value] of Object.entries(values)) text = text.replace(`{${key}}`, String(value));
    return text;
  };

  /* A random UUID. crypto.randomUUID is missing on plain http, which a hospital's network may be. */
  Review.newId = () => {
    const bytes = crypto.getRandomValues(new Uint8Array(16));
    bytes[6] = (bytes[6] & 0x0f) | 0x40;
    bytes[8] = (bytes[8] & 0x3f) | 0x80;
    const hex = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
    return hex.replace(/^(.{8})(.{4})(.{4})(.{4})/, "$1-$2-$3-$4-");
  };

  const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
  Review.isObject = isObject;

  const canonical = (value) => {
    if (Array.isArray(value)) return value.map(canonical);
    if (!isObject(value)) return value;
    return Object.fromEntries(Object.keys(value).sort().map((key) => [key, canonical(value[key])]));
  };

  /* Whether two documents hold the same, whatever the order of their keys. */
  const same = (a, b) => JSON.stringify(canonical(a ?? null)) === JSON.stringify(canonical(b ?? null));
  Review.same = same;

  /* ---- the journal: entries in this browser, kept until they are acknowledged ---- */

  /* localStorage is written at once but reaches the disk seconds later; IndexedDB with strict
   * durability is on the disk when it says so. Each entry is in both and the newer one counts. */
  class Journal {
    constructor(name) {
      this.prefix = `promedical-review/${name}/`;
      this.latest = 0;
      this.database = this._open();
    }

    write(key, entry) {
      this.latest = Math.max(Date.now(), this.latest + 1);
      const kept = { ...entry, at: this.latest };
      try {
        localStorage.setItem(this.prefix + key, JSON.stringify(kept));
      } catch {
        // Full or forbidden: IndexedDB alone then.
      }
      return this._put(key, kept);
    }

    /* The empty entry in localStorage, written at once, outlives a page that closes before IndexedDB
     * has its own; a stale copy there is older and counts no more. */
    remove(key) {
      this.latest = Math.max(Date.now(), this.latest + 1);
      const gone = { at: this.latest, gone: true };
      const text = JSON.stringify(gone);
      const name = this.prefix + key;
      try {
        if (localStorage.getItem(name) !== null) localStorage.setItem(name, text);
      } catch {
        // Forbidden: then there was nothing either.
      }
      return this._put(key, gone).then(() => {
        try {
          if (localStorage.getItem(name) === text) localStorage.removeItem(name);
        } catch {
          // As above.
        }
      });
    }

    /* Every entry by key, the newer of the two copies. */
    async entries() {
      const found = new Map();
      const take = (key, entry) => {
        if (!found.has(key) || found.get(key).at < entry.at) found.set(key, entry);
      };
      try {
        for (let i = 0; i < localStorage.length; i++) {
          const name = localStorage.key(i);
          if (!name.startsWith(this.prefix)) continue;
          take(name.slice(this.prefix.length), JSON.parse(localStorage.getItem(name)));
        }
      } catch {
        // Forbidden, or an entry that is not ours: IndexedDB has its own copy.
      }
      for (const [name, entry] of await this._all()) {
        if (name.startsWith(this.prefix)) take(name.slice(this.prefix.length), entry);
      }
      for (const [key, entry] of found) if (entry.gone) found.delete(key);
      return found;
    }

    _open() {
      return new Promise((resolve) => {
        try {
          const request = indexedDB.open("promedical-review", 1);
          request.onupgradeneeded = () => request.result.createObjectStore("journal");
          request.onsuccess = () => resolve(request.result);
          request.onerror = () => resolve(null);
          request.onblocked = () => resolve(null);
        } catch {
          resolve(null); // a private window, or a file in some browsers
        }
      });
    }

    async _put(key, entry) {
      const database = await this.database;
      if (!database) return;
      await new Promise((resolve) => {
        const change = database.transaction("journal", "readwrite", { durability: "strict" });
        change.objectStore("journal").put(entry, this.prefix + key);
        change.oncomplete = change.onerror = change.onabort = resolve;
      });
    }

    async _all() {
      const database = await this.database;
      if (!database) return [];
      return new Promise((resolve) => {
        const found = [];
        const journal = database.transaction("journal", "readwrite").objectStore("journal");
        const cursor = journal.openCursor();
        cursor.onerror = () => resolve(found);
        cursor.onsuccess = () => {
          if (!cursor.result) return resolve(found);
          const { key, value } = cursor.result;
          if (value.gone && value.at < Date.now() - DAY) cursor.result.delete();
          else found.push([key, value]);
          cursor.result.continue();
        };
      });
    }
  }
  Review.Journal = Journal;

  /* ---- stores: put({assignment, base, save, answer, seconds, finish}) -> outcome ----
   *   {is: "saved", version}  {is: "conflict", version, answer}  {is: "refused", messages}
   *   {is: "lost"}: no answer, try the same again   {is: "signin"}: the session has ended */

  class OnlineStore {
    /* csrf, reviewer: data-csrf and data-reviewer of <body> unless given. */
    constructor({ csrf, reviewer } = {}) {
      this.csrf = csrf ?? document.body.dataset.csrf ?? "";
      this.reviewer = reviewer ?? document.body.dataset.reviewer ?? "";
      this.name = `online/${this.reviewer}`;
    }

    async put(attempt, { closing = false } = {}) {
      const { assignment, ...rest } = attempt;
      const body = JSON.stringify(rest);
      const stop = new AbortController();
      const timer = setTimeout(() => stop.abort(), TIMEOUT);
      let reply;
      try {
        reply = await fetch(`/api/assignments/${encodeURIComponent(assignment)}`, {
          method: "PUT",
          headers: { "Content-Type": "application/json", "X-CSRF-Token": this.csrf },
          credentials: "same-origin",
          redirect: "manual",
          keepalive: closing && body.length * 3 < KEEPALIVE_LIMIT,
          signal: stop.signal,
          body,
        });
        return await this._outcome(reply);
      } catch {
        return { is: "lost" };
      } finally {
        clearTimeout(timer);
      }
    }

    async _outcome(reply) {
      if (reply.type === "opaqueredirect" || reply.status === 401) return { is: "signin" };
      if (reply.status >= 500 || reply.status === 429 || reply.status === 408) return { is: "lost" };
      const data = await reply.json().catch(() => ({}));
      if (reply.ok) return { is: "saved", version: data.version };
      if (reply.status === 409 && data.answer !== undefined && data.version !== undefined) {
        return { is: "conflict", version: data.version, answer: data.answer };
      }
      if (reply.status === 403 && (await this._renewed())) return { is: "lost" };
      const closed = reply.status === 423 || reply.status === 404;
      const messages = closed ? [Review.words("closed")] : messagesOf(data, reply.status);
      return { is: "refused", status: reply.status, messages };
    }

    /* After a new login in another window the page's token is stale: read the page's new one. */
    async _renewed() {
      try {
        const reply = await fetch(location.href, { credentials: "same-origin" });
        const page = new DOMParser().parseFromString(await reply.text(), "text/html");
        const { csrf, reviewer } = page.body.dataset;
        if (!csrf || reviewer !== this.reviewer || csrf === this.csrf) return false;
        this.csrf = csrf;
        document.body.dataset.csrf = csrf;
        return true;
      } catch {
        return false;
      }
    }
  }
  Review.OnlineStore = OnlineStore;

  const messagesOf = (data, status) => {
    const found = data.problems ?? data.detail ?? data.error ?? `HTTP ${status}`;
    return (Array.isArray(found) ? found : [found]).map((entry) =>
      typeof entry === "string" ? entry : entry.say || entry.msg || JSON.stringify(entry),
    );
  };

  /* For the pack that works without a server: answers stay in this browser, and `lines()` is what
   * the reviewer hands back, the last attempt of each assignment as it would have been PUT. */
  class OfflineStore {
    constructor({ pack }) {
      this.name = `offline/${pack}`;
      this.pack = pack;
      this.journal = new Journal(`${this.name}/answers`);
    }

    async put(attempt) {
      const before = await this.answer(attempt.assignment);
      if (before && before.save === attempt.save) return { is: "saved", version: before.version };
      const version = before ? before.version : 0;
      if (version !== attempt.base) return { is: "conflict", version, answer: before.answer };
      const seconds = (before ? before.seconds : 0) + attempt.seconds;
      await this.journal.write(attempt.assignment, { ...attempt, seconds, version: version + 1 });
      return { is: "saved", version: version + 1 };
    }

    async answer(assignment) {
      return (await this.journal.entries()).get(assignment) ?? null;
    }

    async lines() {
      const kept = [...(await this.journal.entries()).values()];
      kept.sort((a, b) => (a.assignment < b.assignment ? -1 : 1));
      return kept.map((entry) => JSON.stringify({ pack: this.pack, ...entry }));
    }

    async download(name) {
      const text = (await this.lines()).join("\n") + "\n";
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([text], { type: "application/x-ndjson" }));
      link.download = name;
      document.body.append(link);
      link.click();
      link.remove();
      setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    }
  }
  Review.OfflineStore = OfflineStore;

  /* ---- time that a person spent on the page ---- */

  /* Seconds in which the page was visible and used; a pause counts for at most `idle` seconds. */
  class ActiveTime {
    constructor(idle = 60) {
      this.idle = idle;
      this.total = 0;
      this.last = performance.now();
      const mark = () => this.mark();
      for (const name of ["keydown", "pointerdown", "pointermove", "scroll", "focusin"]) {
        window.addEventListener(name, mark, { passive: true, capture: true });
      }
      document.addEventListener("visibilitychange", () => this.mark(!document.hidden));
    }

    mark(returning = false) {
      const now = performance.now();
      if (!returning) this.total += Math.min((now - this.last) / 1000, this.idle);
      this.last = now;
    }

    /* The seconds since the last take. */
    take() {
      if (!document.hidden) this.mark();
      const taken = Math.min(this.total, LONGEST_TAKE);
      this.total = 0;
      return Math.round(taken * 10) / 10;
    }
  }
  Review.ActiveTime = ActiveTime;

  /* ---- which pages of this browser are open ---- */

  const channel = "BroadcastChannel" in window ? new BroadcastChannel("promedical-review") : null;
  const pageId = Review.newId();
  let openItem = null; // {name, key} of the item this page edits
  if (channel) {
    channel.onmessage = ({ data }) => {
      if (data.ask && openItem) channel.postMessage({ answer: data.ask, page: pageId, ...openItem });
    };
  }

  /* The other open pages: [{page, name, key}]. A page that was closed or killed does not answer. */
  const openPages = () => {
    if (!channel) return Promise.resolve([]);
    const ask = Review.newId();
    const asking = new BroadcastChannel("promedical-review");
    const found = [];
    asking.onmessage = ({ data }) => {
      if (data.answer === ask && data.page !== pageId) found.push(data);
    };
    asking.postMessage({ ask });
    return new Promise((resolve) =>
      setTimeout(() => {
        asking.close();
        resolve(found);
      }, 250),
    );
  };

  /* ---- saving one item ---- */

  class Autosave {
    /* store: as above.
     * page: what the item's page gives
     *   assignment, version, answer   as the server rendered them (offline: as the store has them)
     *   read() -> answer              the page as it is now
     *   show(answer, {finishing})     puts an answer into the page; `finishing` if the person had
     *                                 finished it and it was not acknowledged yet
     *   label(path) -> text           optional: a field's name in the choice between two versions
     *   value(path, value) -> text    optional: a field's value there
     *   state(name, messages)         optional: saved saving unsent signin refused conflict; returns
     *                                 true if it showed the messages itself
     *   done(outcome)                 optional: after a finishing save was acknowledged
     */
    constructor(store, page) {
      this.store = store;
      this.page = page;
      this.version = page.version;
      this.saved = page.answer; // what the store has at `version`
      this.attempt = null; // sent under its id and not yet answered
      this.draft = null; // newer than saved and attempt; null if there is nothing newer
      this.finishing = null; // {resolve}: a person pressed "finish" and waits
      this.clock = new ActiveTime();
      this.journal = new Journal(store.name);
      this.key = `${page.assignment}/${pageId}`;
      this.retries = 0;
      this.busy = false;
      this.timer = null;
      this.since = null;
      openItem = { name: store.name, key: page.assignment };
    }

    /* Takes over what a closed or killed page left behind; call once, when the page is shown. */
    async start() {
      this._listen();
      const left = await this._leftBehind();
      for (const [key, entry] of left) await this._adopt(key, entry);
      this._state(this._unsent() ? "unsent" : "saved");
      if (this._unsent()) this._pump();
      openPages().then((pages) => {
        const here = (p) => p.name === this.store.name && p.key === this.page.assignment;
        if (pages.some(here)) this._say("elsewhere");
      });
      return this;
    }

    /* To be called after every change; saves a second after the last one. */
    changed() {
      const answer = this.page.read();
      if (same(answer, this.attempt ? this.attempt.answer : this.saved)) {
        if (this.draft === null) return;
        this.draft = null;
      } else {
        this.draft = answer;
      }
      this._record();
      if (!this._unsent()) return this._state("saved");
      if (!this.retries) this._state("saving");
      this.since = this.since ?? performance.now();
      const late = performance.now() - this.since > LONGEST_DELAY;
      this._schedule(late ? 0 : SAVE_DELAY);
    }

    /* Sends what is unsent now, without waiting for the delay. */
    flush() {
      clearTimeout(this.timer);
      return this._pump();
    }

    /* Saves the page as finished. Resolves with the outcome: {is: "saved"}, {is: "refused",
     * messages} or {is: "conflict"}; while the connection is lost it waits and goes on trying. */
    finish() {
      if (this.finishing) return this.finishing.promise;
      const finishing = {};
      finishing.promise = new Promise((resolve) => (finishing.resolve = resolve));
      this.finishing = finishing;
      this.draft = this.page.read();
      this._record();
      this._state("saving");
      this.flush();
      return finishing.promise;
    }

    _unsent() {
      return this.attempt !== null || this.draft !== null;
    }

    _schedule(delay) {
      clearTimeout(this.timer);
      this.timer = setTimeout(() => this._pump(), delay);
    }

    async _pump() {
      if (this.busy || this.choosing) return;
      this.busy = true;
      try {
        while (this._unsent()) {
          this.attempt = this.attempt ?? this._newAttempt();
          this._record();
          if (!this.retries) this._state("saving");
          const outcome = await this.store.put(this.attempt);
          if (!(await this._heard(outcome))) return;
        }
        this._state("saved");
      } finally {
        this.busy = false;
      }
    }

    _newAttempt() {
      const attempt = {
        assignment: this.page.assignment,
        base: this.version,
        save: Review.newId(),
        answer: this.draft,
        seconds: this.clock.take(),
        finish: this.finishing !== null,
      };
      this.draft = null;
      this.since = null;
      return attempt;
    }

    /* Acts on the store's answer; whether to go on sending. */
    async _heard(outcome) {
      if (outcome.is === "lost" || outcome.is === "signin") {
        const delay = RETRY[Math.min(this.retries, RETRY.length - 1)];
        this.retries += 1;
        this._state(outcome.is === "signin" ? "signin" : "unsent");
        this._schedule(delay * (0.75 + Math.random() / 2));
        return false;
      }
      this.retries = 0;
      if (outcome.is === "saved") return this._acknowledged(outcome.version);
      if (outcome.is === "conflict") return this._conflict(outcome);
      this._refused(outcome);
      return false;
    }

    /* What was refused stays a draft, and is sent again only after a change; what was only refused as
     * finished is kept as unfinished. */
    _refused(outcome) {
      const { answer, seconds, finish } = this.attempt;
      this.clock.total += seconds;
      this.draft = this.draft ?? answer;
      this.attempt = null;
      this._state("refused", outcome.messages);
      this._finished({ ...outcome });
      if (finish) {
        const now = this.page.read();
        this.draft = same(now, this.saved) ? null : now;
        if (this._unsent()) this._schedule(SAVE_DELAY);
      }
      this._record();
    }

    async _acknowledged(version) {
      const { answer, finish } = this.attempt;
      this.version = version;
      this.saved = answer;
      this.attempt = null;
      if (version < this.page.version && this.draft === null) this._outdated();
      if (finish) this.draft = null;
      const recorded = this._record();
      if (finish) {
        await recorded; // what follows may leave the page
        this._state("saved");
        this._finished({ is: "saved", version });
        if (this.page.done) this.page.done();
      }
      return true;
    }

    /* What a dead page had left behind had arrived after all, and was saved over since then. */
    _outdated() {
      this.version = this.page.version;
      this.saved = this.page.answer;
      this.page.show(this.page.answer, { finishing: false });
    }

    async _conflict({ version, answer: theirs }) {
      const mine = this.draft ?? this.attempt.answer;
      if (same(theirs, mine) && !this.attempt.finish) return this._acknowledged(version);
      const base = this.saved;
      this.clock.total += this.attempt.seconds;
      this.version = version;
      this.saved = theirs;
      this.draft = mine; // what the journal keeps, should the page die while the person chooses
      this.attempt = null;
      this._record();
      if (same(theirs, mine)) return true; // another window saved the same; finish it now
      this._state("conflict");
      this._finished({ is: "conflict" });
      await this._choose(base, mine, theirs);
      return true;
    }

    async _choose(base, mine, theirs) {
      this.choosing = true;
      const { label, value } = this.page;
      const chosen = await Review.chooseVersions({ base, mine, theirs, label, value });
      this.choosing = false;
      this.page.show(chosen);
      const shown = this.page.read(); // a page may bring what was combined into its form
      this.draft = same(shown, this.saved) ? null : shown;
      this._record();
    }

    _finished(outcome) {
      if (!this.finishing) return;
      this.finishing.resolve(outcome);
      this.finishing = null;
    }

    _record() {
      if (!this._unsent()) return this.journal.remove(this.key);
      const { version, attempt, draft, saved } = this;
      const entry = { version, attempt, draft, base: saved, url: location.pathname };
      return this.journal.write(this.key, entry);
    }

    /* Entries of this item whose pages are gone, oldest first. */
    async _leftBehind() {
      const all = await this.journal.entries();
      const own = [...all].filter(([key]) => key.split("/")[0] === this.page.assignment);
      if (!own.length) return [];
      const open = new Set((await openPages()).map((p) => p.page));
      const left = own.filter(([key]) => !open.has(key.split("/")[1]) && key !== this.key);
      return left.sort((a, b) => a[1].at - b[1].at);
    }

    async _adopt(key, entry) {
      const latest = entry.draft ?? entry.attempt.answer;
      if (this._unsent()) {
        // A second one: two windows died with different work in them.
        const mine = this.page.read();
        if (!same(mine, latest)) await this._choose(entry.base, latest, mine);
      } else {
        this.attempt = entry.attempt;
        this.draft = entry.draft;
        // A draft that was never sent began from that version; the store tells if it is newer.
        if (!entry.attempt) {
          this.version = entry.version;
          this.saved = entry.base;
        }
        this.page.show(latest, { finishing: Boolean(entry.attempt && entry.attempt.finish) });
      }
      await this._record();
      await this.journal.remove(key);
    }

    _listen() {
      const again = () => {
        if (this._unsent() && !this.choosing) this.flush();
      };
      window.addEventListener("online", again);
      window.addEventListener("focus", again);
      window.addEventListener("offline", () => this._unsent() && this._state("unsent"));
      document.addEventListener("visibilitychange", again);
      window.addEventListener("pagehide", () => {
        if (!this._unsent() || this.choosing) return;
        this.attempt = this.attempt ?? this._newAttempt();
        this._record();
        this.store.put(this.attempt, { closing: true });
      });
      window.addEventListener("beforeunload", (event) => {
        if (!this._unsent()) return;
        if (!this.retries) this.flush();
        if (this.retries || this.choosing) event.preventDefault();
      });
    }

    _state(name, messages = []) {
      const told = this.page.state && this.page.state(name, messages);
      this._say(name, told ? [] : messages);
    }

    /* Shows the state in #save-state, and lasting trouble in #save-trouble. */
    _say(name, messages = []) {
      const trouble = document.getElementById("save-trouble");
      if (name === "elsewhere") {
        const notice = document.getElementById("save-elsewhere");
        if (notice) notice.hidden = false;
        return;
      }
      const shown = document.getElementById("save-state");
      if (shown && shown.dataset.state !== name) {
        shown.dataset.state = name;
        shown.textContent = Review.words(name);
      }
      if (!trouble) return;
      const text = { unsent: "unsentLong", signin: "signinLong", refused: "refusedLong" }[name];
      trouble.hidden = !text;
      const wanted = text ? [Review.words(text), ...messages].join(" ") : "";
      if (trouble.textContent !== wanted) trouble.textContent = wanted;
    }
  }
  Review.Autosave = Autosave;

  /* Sends what pages of other items left behind, for a reviewer who went on to the next item or
   * to the start page. Returns [{assignment, url, discard}] of those that need the person. */
  Review.deliverLeftovers = async (store, { except = null } = {}) => {
    const journal = new Journal(store.name);
    const all = [...(await journal.entries())].filter(([key]) => key.split("/")[0] !== except);
    if (!all.length) return [];
    const open = new Set((await openPages()).map((p) => p.page));
    const toChoose = [];
    for (const [key, entry] of all.sort((a, b) => a[1].at - b[1].at)) {
      const [assignment, page] = key.split("/");
      if (open.has(page)) continue;
      const outcome = await deliver(store, journal, key, assignment, entry);
      if (outcome.is === "saved") await journal.remove(key);
      else if (outcome.is !== "lost") toChoose.push({ assignment, url: entry.url, discard: () => journal.remove(key) });
    }
    return toChoose;
  };

  const deliver = async (store, journal, key, assignment, entry) => {
    let base = entry.version;
    if (entry.attempt) {
      const outcome = await store.put(entry.attempt);
      if (outcome.is !== "saved" || entry.draft === null) return outcome;
      base = outcome.version;
    }
    const rest = { assignment, base, save: Review.newId(), seconds: 0, finish: false };
    const attempt = { ...rest, answer: entry.draft };
    await journal.write(key, { ...entry, version: base, attempt, draft: null });
    const outcome = await store.put(attempt);
    // Another page saved the same: then there is nothing to choose.
    if (outcome.is === "conflict" && same(outcome.answer, entry.draft)) return { is: "saved" };
    return outcome;
  };
})();
