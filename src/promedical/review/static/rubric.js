/* The page on which a physician corrects one rubric.
 *
 *   data    {assignment, version, answer, done, draft, content: {messages, reference, shared},
 *            others, addresses: {previous, next, done, hints}}
 *   editor  new Review.RubricEditor(root, data, store).start()
 *
 * `root` holds templates/_rubric_editor.html, in the application as in the offline pack. The state is
 * one answer document; every change makes a new one (undo keeps the old), shows it and hands it to
 * Autosave. Text of others is only ever set as text. Left to others: operations (`draft.js`),
 * what is shown (`rubric_view.js`), saving (`autosave.js`), how changes read (`rubric_changes.js`),
 * keys (`rubric_keys.js`).
 */
"use strict";

(() => {
  const Review = (window.Review = window.Review || {});
  const D = Review.draft;
  const MOST_UNDO = 200;
  const GROUP = 1500; // ms within which changes of one field are one step of undo
  const HINT_DELAY = 1200;

  const words = (name, values) => Review.words(name, values);
  const { percent, make } = Review;

  class RubricEditor extends Review.RubricView {
    constructor(root, data, store) {
      super(root, data);
      this.store = store;
      this.answer = this._complete(data.answer);
      this.past = [];
      this.future = [];
    }

    async start() {
      this._showContent();
      this._listen();
      this._render();
      if (this.locked) this._lock(words("finished_here"));
      else {
        this.autosave = new Review.Autosave(this.store, {
          assignment: this.data.assignment,
          version: this.data.version,
          answer: this.answer,
          read: () => structuredClone(this.answer),
          show: (answer, options) => this._shown(answer, options),
          label: Review.fieldLabel,
          value: (path, value) => Review.fieldValue(path, value, [...this.answer.criteria, ...this.draft]),
          state: (name, messages) => this._saving(name, messages),
          done: () => this._done(),
        });
      }
      if (Review.RubricKeys) this.keys = new Review.RubricKeys(this);
      if (this.autosave) await this.autosave.start();
      this.root.dataset.ready = "yes";
      return this;
    }

    /* ---- state ---- */

    _complete(answer) {
      const given = answer && answer.criteria ? answer : {};
      return {
        decision: null,
        reason: given.reason || "",
        disputed: Boolean(given.disputed),
        criteria: given.criteria || structuredClone(this.draft),
      };
    }

    /* Makes a change. `group`: changes of one group, one after the other, are one step of undo. */
    change(values, group = null) {
      if (this.locked) return;
      const now = performance.now();
      const goesOn = group && group === this.group && now - this.changedAt < GROUP;
      if (!goesOn) {
        this.past.push(this.answer);
        if (this.past.length > MOST_UNDO) this.past.shift();
      }
      [this.group, this.changedAt, this.future] = [group, now, []];
      this._set({ ...this.answer, ...values });
    }

    criteria(next, group = null) {
      this.change({ criteria: next }, group);
    }

    undo() {
      if (!this.past.length || this.locked) return;
      this.future.push(this.answer);
      this.group = null;
      this._set(this.past.pop());
      this.say(words("undone"));
    }

    redo() {
      if (!this.future.length || this.locked) return;
      this.past.push(this.answer);
      this.group = null;
      this._set(this.future.pop());
    }

    _set(answer) {
      this.answer = answer;
      this._render();
      this.autosave.changed();
    }

    /* An answer that comes from the journal or from a choice between two versions. */
    _shown(answer, { finishing = false } = {}) {
      const kept = { ...this._complete(answer), decision: null };
      kept.criteria = D.normalised(kept.criteria);
      this.past.push(this.answer);
      this.answer = kept;
      this._render();
      if (finishing) this._lock(words("finishing"));
    }

    /* ---- operations, on the current criterion unless one is given ---- */

    at(id = this.current) {
      return this.answer.criteria.find((c) => c.id === id) || null;
    }

    newId() {
      return `n-${Review.newId().slice(0, 8)}`;
    }

    add(tier, after = null) {
      const last = this.inTier(tier).at(-1);
      const id = this.newId();
      this.criteria(D.add(this.answer.criteria, tier, id, { after: after ?? (last ? last.id : null) }));
      this.focusText(id);
    }

    remove(id = this.current) {
      const c = this.at(id);
      if (!c) return;
      const peers = this.shownOrder();
      const at = peers.indexOf(id);
      this.criteria(D.remove(this.answer.criteria, id));
      this.focusCard(peers[at + 1] ?? peers[at - 1] ?? null);
      this.say(words("removed"));
    }

    restore(id) {
      const was = this.byId.get(id);
      const later = this.draft.slice(this.draft.indexOf(was) + 1).map((c) => c.id);
      const list = [...this.answer.criteria];
      const at = list.findIndex((c) => later.includes(c.id));
      list.splice(at < 0 ? list.length : at, 0, { ...was, weight: null });
      const next = D.normalised(list);
      this.criteria(was.weight === null ? next : D.edit(next, id, { weight: was.weight }));
      this.focusCard(id);
    }

    split(id = this.current, at = null) {
      const c = this.at(id);
      if (!c) return;
      const [first, second] = Review.cutText(c.text, at);
      const ids = [this.newId(), this.newId()];
      this.criteria(D.split(this.answer.criteria, id, [[ids[0], first], [ids[1], second]]));
      this.focusText(second ? ids[0] : ids[1]);
      this.say(words("was_split"));
    }

    merge(id = this.current) {
      const c = this.at(id);
      if (!c) return;
      const peers = this.inTier(c.tier);
      const at = peers.findIndex((other) => other.id === id);
      const pair = at + 1 < peers.length ? [peers[at], peers[at + 1]] : [peers[at - 1], peers[at]];
      if (!pair[0]) return this.say(words("nothing_to_merge"));
      const made = this.newId();
      this.criteria(D.merge(this.answer.criteria, pair[0].id, pair[1].id, made));
      this.focusText(made);
      this.say(words("was_merged"));
    }

    move(step, id = this.current) {
      if (!this.at(id)) return;
      const active = document.activeElement;
      this.criteria(D.move(this.answer.criteria, id, step));
      if (this.cards.get(id).contains(active)) active.focus();
      const c = this.at(id);
      const peers = this.inTier(c.tier);
      this.say(words("moved_to", { at: peers.indexOf(c) + 1, of: peers.length }));
    }

    setField(id, name, value) {
      const c = this.at(id);
      if (!c || c[name] === value) return;
      this.criteria(D.edit(this.answer.criteria, id, { [name]: value }), name === "text" ? `text/${id}` : null);
      if (name === "tier") this.focusCard(id);
    }

    setShare(id, typed) {
      const share = Number(String(typed).replace(",", ".")) / 100;
      if (!(share >= 0 && share <= 1) || String(typed).trim() === "") return this._render();
      if (percent(this.at(id).weight) === percent(share)) return this._render();
      if (this.inTier("proficiency").length === 1) this.say(words("only_one"));
      this.criteria(D.edit(this.answer.criteria, id, { weight: share }));
    }

    /* ---- the end ---- */

    async accept() {
      if (this.locked) return;
      const faults = this._faults();
      if (faults.length) return this._tell(faults);
      await this._finish(this.edits().length ? "accept_with_edits" : "accept");
    }

    reject() {
      if (this.locked) return;
      const dialog = this.part("reject");
      const reason = dialog.querySelector("textarea");
      reason.value = this.answer.reason;
      dialog.returnValue = "";
      dialog.showModal();
      reason.focus();
    }

    async _rejected(reason) {
      if (!reason.trim()) return;
      this.change({ reason });
      await this._finish("reject");
    }

    async _finish(decision) {
      this._tell([]);
      this.answer = { ...this.answer, decision };
      this._lock(words("finishing"));
      const outcome = await this.autosave.finish();
      if (outcome.is !== "saved") this._unlock();
    }

    _done() {
      this._lock(words("finished_here"));
      const to = this.data.addresses.done;
      this.root.dispatchEvent(new CustomEvent("rubric-done", { bubbles: true }));
      if (to) location.assign(to);
    }

    _saving(name, messages) {
      if (name === "conflict" || name === "refused") this._unlock();
      if (name === "refused") this._tell(messages.map((message) => this._fault(message)));
      return name === "refused";
    }

    /* A fault that the server found: in the reader's language if it is one of wording. */
    _fault(message) {
      const found = /^\[(\w+)\] criteria\[(\d+)\]/.exec(message);
      const c = found && this.answer.criteria[Number(found[2])];
      return c ? { id: c.id, say: `${this.name(c)}: ${words("hint_" + found[1])}` } : { say: message };
    }

    _faults() {
      const found = [];
      for (const c of this.answer.criteria) {
        if (!c.text.trim()) found.push({ id: c.id, say: words("empty_text", { name: this.name(c) }) });
      }
      if (!this.data.content.safety_only && !this.inTier("proficiency").length) {
        found.push({ say: words("no_proficiency") });
      }
      return found;
    }

    _tell(faults) {
      const box = this.part("faults");
      box.hidden = !faults.length;
      box.replaceChildren(...faults.map((fault) => make("p", "", fault.say)));
      for (const card of this.cards.values()) {
        card.querySelector("textarea").removeAttribute("aria-invalid");
      }
      const first = faults.find((fault) => fault.id);
      if (!first) return faults.length && box.scrollIntoView({ block: "nearest" });
      this.cards.get(first.id).querySelector("textarea").setAttribute("aria-invalid", "true");
      this.focusText(first.id);
    }

    _lock(text) {
      this.locked = true;
      this.root.dataset.locked = this.data.done ? "done" : "yes";
      this.part("editable").inert = true;
      for (const button of this.root.querySelectorAll("[data-do]")) {
        if (!["help"].includes(button.dataset.do)) button.disabled = true;
      }
      this.part("locked").hidden = false;
      this.part("locked").textContent = text;
    }

    _unlock() {
      if (this.data.done) return;
      this.locked = false;
      this.answer = { ...this.answer, decision: null };
      delete this.root.dataset.locked;
      this.part("editable").inert = false;
      for (const button of this.root.querySelectorAll("[data-do]")) button.disabled = false;
      this.part("locked").hidden = true;
      this._render();
    }

    /* ---- the page ---- */

    /* Asks what may keep a judge from deciding sentences that were changed. */
    _askHints() {
      const address = this.data.addresses.hints;
      if (!address) return;
      clearTimeout(this.hintTimer);
      this.hintTimer = setTimeout(async () => {
        const texts = this.answer.criteria.map((c) => c.text).filter((t) => t.trim() && !this.hints.has(t));
        if (!texts.length) return;
        try {
          const reply = await fetch(address, {
            method: "POST",
            headers: { "Content-Type": "application/json", "X-CSRF-Token": this.store.csrf },
            body: JSON.stringify({ texts }),
          });
          if (!reply.ok) return;
          const { hints } = await reply.json();
          texts.forEach((text, i) => this.hints.set(text, hints[i]));
          for (const c of this.answer.criteria) this._renderHint(this.cards.get(c.id), c);
        } catch {
          // Hints are a help; without a connection there are none.
        }
      }, HINT_DELAY);
    }

    _listen() {
      const does = {
        undo: () => this.undo(),
        redo: () => this.redo(),
        accept: () => this.accept(),
        reject: () => this.reject(),
        help: () => this.part("help").showModal(),
      };
      this.root.addEventListener("click", (event) => {
        const button = event.target.closest("[data-do], [data-add]");
        if (!button || button.disabled) return;
        if (button.dataset.add) this.add(button.dataset.add);
        else if (does[button.dataset.do]) does[button.dataset.do]();
      });
      const reason = this.part("reason");
      reason.addEventListener("input", () => this.change({ reason: reason.value }, "reason"));
      const disputed = this.part("disputed");
      disputed.addEventListener("change", () => this.change({ disputed: disputed.checked }));
      const dialog = this.part("reject");
      dialog.querySelector("form").addEventListener("submit", (event) => {
        if (event.submitter.value === "reject") this._rejected(dialog.querySelector("textarea").value);
      });
    }
  }
  Review.RubricEditor = RubricEditor;

  /* In the application the page holds one editor and its data. */
  const data = document.getElementById("rubric-data");
  if (data) {
    const store = new Review.OnlineStore();
    const root = document.querySelector("[data-rubric-editor]");
    const given = JSON.parse(data.textContent);
    Review.editor = new RubricEditor(root, given, store);
    Review.editor.start();
    Review.deliverLeftovers(store, { except: given.assignment });
  }
})();
