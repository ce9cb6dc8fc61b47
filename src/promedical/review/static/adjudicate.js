/* An item of an adjudication: from what is on the page to the answer document, and back.
 *
 *   preference   stated first; when it is saved, the page is asked for again and holds the criteria
 *   criteria     met / not met / cannot say (a veto: violated / not violated / cannot say)
 *   blind        a third reader's own verdicts; saved, they bring the page with the others' votes
 *
 * Saving is autosave.js. Keys: arrows or j, k between criteria; m u c and v n c judge and go on;
 * g guidelines differ; e note; 1 2 … responses; in the preference 1–5 and 0. A classic script: the
 * offline pack calls Review.Adjudication with its own store. Defines Review.Adjudication.
 */
"use strict";

(() => {
  const Review = (window.Review = window.Review || {});
  const KEYS = { m: "met", u: "unmet", v: "met", n: "unmet", c: "cannot_say" };
  const VETO_ONLY = ["v"];
  const POSITIVE_ONLY = ["m", "u"];

  const all = (root, selector) => [...root.querySelectorAll(selector)];
  const isEmpty = (object) => Object.keys(object).length === 0;

  /* The page again, with what may be seen now; it begins at its top, not where this one was left. */
  const showNextStage = () => {
    history.scrollRestoration = "manual";
    location.reload();
  };

  class Adjudication {
    /* root: the item's <article class="adjudication">.
     * store: of stores.js.
     * version, answer: where the store is; those in the page's data unless given.
     * next: called after the item was finished; goes to data-next unless given. */
    constructor(root, store, { version, answer, next } = {}) {
      this.root = root;
      this.stage = root.dataset.stage;
      this.part = root.dataset.part;
      this.first = answer ?? JSON.parse(root.dataset.answer);
      this.given = this.first.preference_given === true;
      this.blind = this.first.blind ?? null;
      this.rest = {}; // parts of the answer that this page does not show
      this.current = null;
      this.next = next ?? (() => location.assign(root.dataset.next));
      this.waiting = null; // "preference" or "blind" until that was saved
      this.show(this.first);
      if (this.stage === "done") return this._readOnly();
      this.autosave = new Review.Autosave(store, {
        assignment: root.dataset.assignment,
        version: version ?? Number(root.dataset.version),
        answer: this.first,
        read: () => this.read(),
        show: (given) => this.show(given),
        label: (path) => this._label(path),
        value: (path, value) => this._value(path, value),
        state: (name) => this._saved(name),
        done: () => this._leave(this.next),
      });
      this._listen();
      this.autosave.start();
      if (this.stage !== "preference") this._open(this._unjudged()[0] ?? this._criteria()[0], false);
    }

    word(name, values = {}) {
      let text = this.root.dataset[`word${name}`] ?? name;
      for (const [key, value] of Object.entries(values)) text = text.replace(`{${key}}`, String(value));
      return text;
    }

    /* ---- the answer document ---- */

    read() {
      const answer = { ...this.rest };
      if (this.part === "third") {
        answer.asked = this.first.asked;
        answer.blind = this.blind;
      } else {
        answer.preference = this._preference();
        answer.preference_given = this.given;
      }
      if (this.stage === "preference" && !this._criteria().length) return answer;
      answer.verdicts = {};
      answer.disputed = {};
      for (const box of this._criteria()) {
        const { key, criterion } = box.dataset;
        const v = box.querySelector("input[type=radio]:checked")?.value ?? null;
        const note = box.querySelector("[data-note]").value;
        if (v || note) (answer.verdicts[key] = answer.verdicts[key] ?? {})[criterion] = { v, note };
        if (box.querySelector("[data-flag]").checked) {
          (answer.disputed[key] = answer.disputed[key] ?? {})[criterion] = true;
        }
      }
      // Without a server the criteria are in the page from the start; an answer begins without them.
      if (this.part === "first" && !this.given && isEmpty(answer.verdicts)) {
        delete answer.verdicts;
        delete answer.disputed;
      }
      answer.dangers = {};
      for (const entry of all(this.root, ".danger-entry")) {
        const { key } = entry.closest("[data-key]").dataset;
        (answer.dangers[key] = answer.dangers[key] ?? []).push({
          id: entry.dataset.id,
          kind: entry.querySelector("[data-danger-kind]").value,
          text: entry.querySelector("[data-danger-text]").value,
        });
      }
      return answer;
    }

    _preference() {
      const fields = all(this.root, ".pair");
      if (this.first.preference_given || !fields.length) return this.first.preference ?? {};
      const chosen = fields.map((f) => [f.dataset.pair, f.querySelector("input:checked")?.value]);
      return Object.fromEntries(chosen.filter(([, value]) => value));
    }

    show(answer) {
      const shownHere = ["preference", "preference_given", "asked", "blind"];
      const parts = this._criteria().length ? ["verdicts", "disputed", "dangers"] : [];
      const known = new Set([...shownHere, ...parts]);
      this.rest = Object.fromEntries(Object.entries(answer).filter(([name]) => !known.has(name)));
      for (const field of all(this.root, ".pair")) {
        const value = answer.preference?.[field.dataset.pair];
        for (const radio of all(field, "input")) radio.checked = radio.value === value;
      }
      for (const box of this._criteria()) {
        const { key, criterion } = box.dataset;
        const entry = answer.verdicts?.[key]?.[criterion] ?? {};
        for (const radio of all(box, "input[type=radio]")) radio.checked = radio.value === entry.v;
        box.querySelector("[data-note]").value = entry.note ?? "";
        if (entry.note) box.querySelector(".note-box").open = true;
        box.querySelector("[data-flag]").checked = answer.disputed?.[key]?.[criterion] === true;
      }
      for (const list of all(this.root, ".danger-list")) {
        const { key } = list.closest("[data-key]").dataset;
        list.replaceChildren(...(answer.dangers?.[key] ?? []).map((entry) => this._danger(entry)));
      }
      this._count();
    }

    _danger(entry) {
      const template = this.root.querySelector(".danger-template");
      const made = template.content.firstElementChild.cloneNode(true);
      made.dataset.id = entry.id;
      made.querySelector("[data-danger-kind]").value = entry.kind;
      made.querySelector("[data-danger-text]").value = entry.text;
      return made;
    }

    /* ---- what is on the page ---- */

    _criteria() {
      return all(this.root, ".criterion");
    }

    _unjudged() {
      return this._criteria().filter((box) => !box.querySelector("input[type=radio]:checked"));
    }

    _panelOf(box) {
      return box.closest(".panel");
    }

    _count() {
      const boxes = this._criteria();
      const done = boxes.length - this._unjudged().length;
      const shown = this.root.querySelector("[data-tally]");
      const bar = this.root.querySelector("[data-progress]");
      const pairs = all(this.root, ".pair");
      const early = this.stage === "preference";
      if (shown) {
        shown.hidden = early;
        shown.textContent = early ? "" : this.word("Judged", { done, all: boxes.length });
        bar.max = early ? Math.max(pairs.length, 1) : Math.max(boxes.length, 1);
        bar.value = early ? pairs.filter((p) => p.querySelector("input:checked")).length : done;
        bar.hidden = early && pairs.length < 2;
      }
      for (const box of boxes) {
        const v = box.querySelector("input[type=radio]:checked")?.value;
        if (v) box.dataset.judged = v;
        else delete box.dataset.judged;
      }
      for (const tab of all(this.root, "[role=tab]")) {
        const own = boxes.filter((box) => box.dataset.key === tab.dataset.key);
        const left = own.filter((box) => !box.dataset.judged).length;
        tab.querySelector("[data-count]").textContent = `${own.length - left}/${own.length}`;
        tab.classList.toggle("complete", left === 0);
      }
      const go = this.root.querySelector("[data-go-on]");
      if (go) go.disabled = pairs.some((pair) => !pair.querySelector("input:checked"));
      const reveal = this.root.querySelector("[data-reveal]");
      if (reveal) reveal.disabled = done < boxes.length;
    }

    _open(box, focus = true) {
      if (!box) return;
      const key = box.dataset.key;
      for (const panel of all(this.root, ".panel")) panel.hidden = panel.dataset.key !== key;
      for (const tab of all(this.root, "[role=tab]")) {
        const selected = tab.dataset.key === key;
        tab.setAttribute("aria-selected", String(selected));
        tab.tabIndex = selected ? 0 : -1;
      }
      if (!box.classList.contains("criterion")) return;
      this._mark(box);
      if (!focus) return;
      const radio = box.querySelector("input[type=radio]:checked") ?? box.querySelector("input[type=radio]");
      radio.focus({ preventScroll: true });
      box.scrollIntoView({ block: "nearest" });
    }

    _mark(box) {
      this.current?.classList.remove("current");
      this.current = box;
      box.classList.add("current");
    }

    _move(step) {
      const boxes = this._criteria();
      const at = boxes.indexOf(this.current);
      this._open(boxes[Math.min(Math.max(at + step, 0), boxes.length - 1)]);
    }

    _onward() {
      const boxes = this._criteria();
      const left = this._unjudged();
      const after = left.filter((box) => boxes.indexOf(box) > boxes.indexOf(this.current));
      const next = after[0] ?? left[0];
      if (next) return this._open(next);
      const button = this.root.querySelector("[data-reveal]:not([disabled]), [data-finish]:not([hidden])");
      if (button) button.focus();
    }

    _response(index) {
      const panel = all(this.root, ".panel")[index];
      if (!panel) return;
      const own = all(panel, ".criterion");
      this._open(own.find((box) => !box.dataset.judged) ?? own[0] ?? panel);
    }

    _readOnly() {
      for (const field of all(this.root, "input, textarea, select, .danger-add, [data-danger-remove]")) {
        field.disabled = true;
      }
      this._tabs();
      this._open(this._criteria()[0], false);
    }

    /* ---- events ---- */

    _tabs() {
      for (const tab of all(this.root, "[role=tab]")) {
        tab.addEventListener("click", () => {
          const panel = all(this.root, ".panel").find((p) => p.dataset.key === tab.dataset.key);
          this._open(panel.querySelector(".criterion:not([data-judged])") ?? panel.querySelector(".criterion") ?? panel, false);
        });
        tab.addEventListener("keydown", (event) => {
          const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
          if (!step) return;
          const tabs = all(this.root, "[role=tab]");
          const other = tabs[(tabs.indexOf(tab) + step + tabs.length) % tabs.length];
          other.click();
          other.focus();
          event.preventDefault();
          event.stopPropagation();
        });
      }
    }

    _listen() {
      this._tabs();
      const changed = () => {
        this._count();
        this._problem("");
        this.autosave.changed();
      };
      this.root.addEventListener("input", changed);
      this.root.addEventListener("focusin", (event) => {
        const box = event.target.closest(".criterion");
        if (box) this._mark(box);
      });
      this.root.addEventListener("click", (event) => {
        const add = event.target.closest(".danger-add");
        const remove = event.target.closest("[data-danger-remove]");
        if (add) {
          const made = this._danger({ id: Review.newId(), kind: "harmful_advice", text: "" });
          add.parentElement.querySelector(".danger-list").append(made);
          made.querySelector("[data-danger-text]").focus();
        }
        if (remove) {
          const back = remove.closest(".dangers").querySelector(".danger-add");
          remove.closest(".danger-entry").remove();
          back.focus();
        }
        if (add || remove) changed();
        if (event.target.closest("[data-go-on]")) this._goOn();
        if (event.target.closest("[data-reveal]")) this._reveal();
        if (event.target.closest("[data-finish]")) this._finish();
      });
      document.addEventListener("keydown", (event) => this._key(event));
    }

    _key(event) {
      const { target, key } = event;
      if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
      if (document.querySelector("dialog[open]")) return;
      if (target.closest("textarea, select, input:not([type=radio], [type=checkbox])")) {
        if (key === "Escape") this.current?.querySelector("input[type=radio]")?.focus();
        return;
      }
      const handled = this.stage === "preference" ? this._preferenceKey(key) : this._criterionKey(key, target);
      if (handled) event.preventDefault();
    }

    _preferenceKey(key) {
      if (!/^[0-5]$/.test(key)) return false;
      const pairs = all(this.root, ".pair");
      const focused = document.activeElement?.closest?.(".pair");
      const pair = focused ?? pairs.find((p) => !p.querySelector("input:checked")) ?? pairs[pairs.length - 1];
      const radios = all(pair, "input");
      this._choose(radios[key === "0" ? radios.length - 1 : Number(key) - 1]);
      const open = pairs.find((p) => !p.querySelector("input:checked"));
      (open ? open.querySelector("input") : this.root.querySelector("[data-go-on]")).focus();
      return true;
    }

    _criterionKey(key, target) {
      const name = key.length === 1 ? key.toLowerCase() : key;
      if (name === "ArrowDown" || name === "ArrowUp") {
        // The text of a response scrolls with the arrows when it has the focus.
        if (target.closest(".text, [role=tab], summary")) return false;
        this._move(name === "ArrowDown" ? 1 : -1);
        return true;
      }
      if (name === "j" || name === "k") {
        this._move(name === "j" ? 1 : -1);
        return true;
      }
      if (/^[1-9]$/.test(name)) {
        this._response(Number(name) - 1);
        return true;
      }
      if (!this.current) return false;
      if (name in KEYS) {
        const veto = this.current.dataset.tier === "veto";
        if ((veto ? POSITIVE_ONLY : VETO_ONLY).includes(name)) return true;
        this._choose(this.current.querySelector(`input[value=${KEYS[name]}]`));
        this._onward();
        return true;
      }
      if (name === "g") {
        this.current.querySelector("[data-flag]").click();
        return true;
      }
      if (name === "e") {
        this.current.querySelector(".note-box").open = true;
        this.current.querySelector("[data-note]").focus();
        return true;
      }
      return false;
    }

    _choose(radio) {
      radio.checked = true;
      radio.dispatchEvent(new Event("input", { bubbles: true }));
    }

    _problem(text) {
      const line = this.root.querySelector(".dock-problem");
      line.textContent = text;
      line.hidden = !text;
    }

    /* ---- steps that cannot be taken back ---- */

    _goOn() {
      this.given = true;
      this.waiting = "preference";
      this._send();
    }

    _reveal() {
      const { verdicts, disputed } = this.read();
      this.blind = { verdicts, disputed };
      this.waiting = "blind";
      this._send();
    }

    _send() {
      for (const button of all(this.root, "[data-go-on], [data-reveal]")) button.disabled = true;
      for (const field of all(this.root, ".pair input")) field.disabled = true;
      this.autosave.changed();
      this.autosave.flush();
    }

    _saved(name) {
      if (name === "refused" || name === "conflict") {
        if (!this.waiting) return;
        if (this.waiting === "preference") this.given = false;
        if (this.waiting === "blind") this.blind = null;
        this.waiting = null;
        for (const field of all(this.root, ".pair input")) field.disabled = false;
        this._count();
      }
      if (name !== "saved" || !this.autosave) return;
      // Also when a page that was closed before its save was acknowledged left it to this one.
      const kept = this.autosave.saved ?? {};
      const revealed = this.stage === "preference" ? kept.preference_given : this.stage === "blind" && kept.blind;
      if (revealed) this._leave(showNextStage);
    }

    /* Leaves the page when the journal has forgotten on the disk too what was acknowledged; else the
     * next page would find an older entry there and send it again. */
    async _leave(go) {
      await this.autosave.journal.remove(this.autosave.key);
      go();
    }

    async _finish() {
      const missing = this._unjudged();
      if (missing.length) {
        this._open(missing[0]);
        return this._problem(this.word("Missing", { n: missing.length }));
      }
      const empty = all(this.root, "[data-danger-text]").find((field) => !field.value.trim());
      if (empty) {
        this._open(this._panelOf(empty));
        empty.focus();
        return this._problem(this.word("MissingDanger"));
      }
      const button = this.root.querySelector("[data-finish]");
      button.disabled = true;
      const outcome = await this.autosave.finish();
      button.disabled = false;
      if (outcome.is === "refused") this._problem((outcome.messages ?? []).join(" "));
    }

    /* ---- words for the choice between two versions ---- */

    _label(path) {
      const [part, key, criterion] = path;
      const panel = all(this.root, ".panel").find((p) => p.dataset.key === key);
      const label = panel?.dataset.label ?? "";
      if (part === "preference" || part === "preference_given") return this.word("Preference");
      if (part === "dangers") return this.word("Danger", { label });
      const box = this._criteria().find((b) => b.dataset.key === key && b.dataset.criterion === criterion);
      const text = box?.querySelector("legend").textContent.trim() ?? path.join(" › ");
      return this.word("Verdict", { label, text });
    }

    _value(path, value) {
      if (value === undefined || value === null || value === "") return Review.words("nothing");
      const shown = typeof value === "object" ? (value.v ?? value.text ?? JSON.stringify(value)) : value;
      const [part, key, criterion] = path;
      const box = this._criteria().find((b) => b.dataset.key === key && b.dataset.criterion === criterion);
      const holder = part === "preference" ? this.root : box;
      const option = holder && all(holder, "input[type=radio]").find((r) => r.value === shown);
      if (part === "disputed" && box) return value ? box.querySelector(".flag").textContent.trim() : "–";
      return option ? option.parentElement.querySelector("span").textContent.trim() : String(shown);
    }
  }
  Review.Adjudication = Adjudication;

  document.addEventListener("DOMContentLoaded", () => {
    const root = document.querySelector(".adjudication:not([data-offline])");
    if (!root || !Review.OnlineStore || document.body.dataset.offline !== undefined) return;
    const store = new Review.OnlineStore();
    root.review = new Adjudication(root, store);
    Review.deliverLeftovers(store, { except: root.dataset.assignment });
  });
})();
