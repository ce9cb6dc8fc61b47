/* Keeps what a reviewer writes: nothing is lost to a reload, a crash, or a lost connection.
 *
 *   page ── changed() ──> Autosave ── journal (this browser, at once) ──> store (server or file)
 *
 * Every attempt to save has an id that it keeps however often it is retried, so a retry after a lost
 * reply changes nothing. An entry leaves the journal only when the store has acknowledged it; a page
 * that opens takes over what a closed or killed page of the same item left there. If the store has
 * another version than the one this page began from, both are shown and the person chooses.
 *
 * A classic script, after `stores.js`. Defines `Review.Autosave`, ActiveTime and deliverLeftovers.
 * Left to others: journal and stores (`stores.js`), what an answer is and how it is shown, two
 * versions (`versions.js`).
 */
"use strict";

(() => {
  const Review = (window.Review = window.Review || {});
  const { Journal, same } = Review;
  const SAVE_DELAY = 1000; // ms after the last change until it is sent
  const LONGEST_DELAY = 5000; // ms after the first unsent change, however fast a person types
  const RETRY = [1000, 2000, 4000, 8000, 15000, 30000];
  const LONGEST_TAKE = 3600; // seconds; the server takes no more for one save

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
    /* store: of stores.js.
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
