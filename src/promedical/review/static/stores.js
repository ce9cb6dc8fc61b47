/* Where what a reviewer writes is kept: this browser's journal, the server, or the offline pack.
 *
 *   Journal       entries in this browser, each until it is acknowledged
 *   OnlineStore   put(attempt) sends it to the server
 *   OfflineStore  put(attempt) keeps it in this browser; lines() is what the reviewer hands back
 *
 * A classic script without imports, so that the offline pack can hold it in one file. It also defines
 * what every script needs: `Review.words`, `same`, `newId`, `isObject`. Left to others: when something
 * is sent, and what follows (`autosave.js`).
 */
"use strict";

(() => {
  const Review = (window.Review = window.Review || {});
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
})();
