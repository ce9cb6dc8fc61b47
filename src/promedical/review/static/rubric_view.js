/* What the page of one rubric shows of the answer document; RubricEditor (`rubric.js`) extends it.
 *
 * `_render()` brings the page to `this.answer`: the cards of the criteria, by tier and in order, what
 * was removed, weights, marks of edits. A card stays the same element as long as its criterion is
 * there, so that the cursor stays where it is. What a person does in a card goes to the editor's
 * operations. Text of others is only ever set as text.
 */
"use strict";

(() => {
  const Review = (window.Review = window.Review || {});
  const D = Review.draft;
  const words = (name, values) => Review.words(name, values);
  const { percent, make } = Review;

  class RubricView {
    constructor(root, data) {
      this.root = root;
      this.data = data;
      this.draft = data.draft;
      this.byId = new Map(this.draft.map((c) => [c.id, c]));
      this.cards = new Map();
      this.hints = new Map(); // text → codes
      this.locked = Boolean(data.done);
      this.current = null;
    }

    inTier(tier) {
      return this.answer.criteria.filter((c) => c.tier === tier);
    }

    edits() {
      return D.counted(D.diff(this.draft, this.answer.criteria));
    }

    part(name) {
      return this.root.querySelector(`[data-part="${name}"]`);
    }

    say(text) {
      this.part("announce").textContent = text;
    }

    name(c) {
      const at = this.inTier(c.tier).findIndex((other) => other.id === c.id) + 1;
      return `${words("tier_" + c.tier)} ${at}`;
    }

    shownOrder() {
      return D.TIERS.flatMap((tier) => this.inTier(tier).map((c) => c.id));
    }

    focusCard(id) {
      const card = this.cards.get(id);
      if (card) card.focus();
    }

    focusText(id) {
      const card = this.cards.get(id);
      if (!card) return;
      const text = card.querySelector("textarea");
      text.focus();
      text.setSelectionRange(text.value.length, text.value.length);
    }

    _showContent() {
      const { messages, reference, shared = [] } = this.data.content;
      this.part("messages").replaceChildren(
        ...messages.map(({ role, content }) => {
          const box = make("div", `message message-${role}`);
          if (messages.length > 1 || role !== "user") box.append(make("p", "message-role", words("role_" + role)));
          box.append(make("div", "prose", content));
          return box;
        }),
      );
      this.part("reference-box").hidden = !reference;
      this.part("reference").textContent = reference || "";
      this.part("reference-box").open = !matchMedia("(max-width: 900px)").matches;
      for (const tier of D.TIERS) {
        const own = shared.filter((c) => c.tier === tier);
        const box = this.tierPart(tier, "shared");
        box.hidden = !own.length;
        box.querySelector("ul").replaceChildren(...own.map((c) => make("li", "", c.text)));
      }
      this._showOthers();
    }

    /* For the lead who decides: the reviewers' versions, each to be taken over as a start. */
    _showOthers() {
      const box = this.part("others");
      const others = this.data.others || [];
      box.hidden = !others.length;
      others.forEach((other, i) => {
        const one = document.getElementById("other-template").content.firstElementChild.cloneNode(true);
        one.querySelector("h3").textContent = words("other_reviewer", { letter: "AB"[i] || i + 1 });
        one.querySelector("[data-other=decision]").textContent = words("decided_" + other.decision);
        one.querySelector("[data-other=reason]").textContent = other.reason;
        one.querySelector("[data-other=reason]").hidden = !other.reason;
        one.querySelector("[data-other=disputed]").hidden = !other.disputed;
        one.querySelector("ul").replaceChildren(...Review.changeLines(this.draft, other.criteria));
        const take = one.querySelector("button");
        take.hidden = this.locked;
        take.addEventListener("click", () => {
          this.change({ criteria: structuredClone(other.criteria), disputed: other.disputed });
          this.say(words("taken"));
        });
        box.append(one);
      });
    }

    tierPart(tier, name) {
      return this.root.querySelector(`[data-tier="${tier}"] [data-tier-part="${name}"]`);
    }

    _render() {
      const edits = this.edits();
      const by = new Map();
      for (const e of edits) by.set(e.criterion, [...(by.get(e.criterion) || []), e.what]);
      const present = new Set(this.answer.criteria.map((c) => c.id));
      for (const [id, card] of this.cards) {
        if (!present.has(id)) {
          card.parentElement.remove();
          this.cards.delete(id);
        }
      }
      for (const tier of D.TIERS) this._renderTier(tier, by);
      this._renderRemoved(edits);
      this._renderBar(edits);
      if (!present.has(this.current)) this.current = null;
      this._markCurrent();
    }

    _renderTier(tier, by) {
      const list = this.tierPart(tier, "list");
      const own = this.inTier(tier);
      own.forEach((c, i) => {
        const card = this.cards.get(c.id) || this._makeCard(c.id);
        if (list.children[i] !== card.parentElement) {
          const active = card.contains(document.activeElement) ? document.activeElement : null;
          list.insertBefore(card.parentElement, list.children[i] || null);
          if (active) active.focus();
        }
        this._renderCard(card, c, i, own.length, by.get(c.id) || []);
      });
      this.tierPart(tier, "count").textContent = String(own.length);
      this.tierPart(tier, "empty").hidden = own.length > 0;
      if (tier === "proficiency") this._renderShares(own);
    }

    _renderShares(own) {
      const bar = this.tierPart("proficiency", "shares");
      bar.hidden = own.length < 2;
      while (bar.children.length > own.length) bar.lastElementChild.remove();
      own.forEach((c, i) => {
        const piece = bar.children[i] || bar.appendChild(make("span"));
        piece.style.flexGrow = String(Math.max(c.weight, 0.004));
        piece.textContent = c.weight >= 0.06 ? `${Math.round(c.weight * 100)}` : "";
        piece.dataset.current = c.id === this.current ? "yes" : "";
      });
    }

    _makeCard(id) {
      const item = document.getElementById("criterion-template").content.firstElementChild.cloneNode(true);
      const card = item.querySelector(".criterion");
      card.dataset.id = id;
      this.cards.set(id, card);
      const text = card.querySelector("textarea");
      text.addEventListener("input", () => this.setField(id, "text", text.value));
      card.addEventListener("focusin", () => {
        this.current = id;
        this._markCurrent();
      });
      const share = card.querySelector(".share input");
      share.addEventListener("change", () => this.setShare(id, share.value));
      for (const name of ["tier", "axis", "kind"]) {
        const select = card.querySelector(`[data-field="${name}"]`);
        select.addEventListener("change", () => this.setField(id, name, select.value || null));
      }
      const tools = {
        up: () => this.move(-1, id),
        down: () => this.move(1, id),
        split: () => this.split(id, text.selectionStart === text.value.length ? null : text.selectionStart),
        merge: () => this.merge(id),
        remove: () => this.remove(id),
      };
      for (const [name, run] of Object.entries(tools)) {
        card.querySelector(`[data-tool="${name}"]`).addEventListener("click", run);
      }
      return card;
    }

    _renderCard(card, c, i, of, edits) {
      const name = this.name(c);
      const set = (selector, values) => Object.assign(card.querySelector(selector), values);
      card.setAttribute("aria-label", words("criterion_of", { name, of }));
      set(".criterion-number", { textContent: String(i + 1) });
      const text = card.querySelector("textarea");
      if (text.value !== c.text) text.value = c.text;
      text.setAttribute("aria-label", name);
      this._fit(text);
      const share = card.querySelector(".share");
      share.hidden = c.weight === null;
      const input = share.querySelector("input");
      input.setAttribute("aria-label", words("share_of", { name }));
      const shown = c.weight === null ? "" : String(percent(c.weight));
      if (input.value !== shown && (document.activeElement !== input || !this.typing)) input.value = shown;
      this._renderSelects(card, c);
      set("[data-tool=up]", { disabled: i === 0 });
      set("[data-tool=down]", { disabled: i === of - 1 });
      set("[data-tool=merge]", { disabled: of < 2 });
      this._renderMarks(card, c, edits);
      this._renderHint(card, c);
    }

    _renderSelects(card, c) {
      const axis = card.querySelector("[data-field=axis]");
      for (const group of axis.querySelectorAll("optgroup")) {
        group.hidden = group.disabled = group.dataset.tier !== c.tier && ![...group.children].some((o) => o.value === c.axis);
      }
      const known = [...axis.options].some((option) => option.value === (c.axis || ""));
      if (!known) axis.add(new Option(c.axis, c.axis)); // as set, so as text
      axis.value = c.axis || "";
      card.querySelector("[data-field=tier]").value = c.tier;
      const kind = card.querySelector("[data-field=kind]");
      kind.value = c.kind || "";
      kind.closest("label").hidden = c.tier !== "veto";
      axis.closest("label").hidden = c.tier === "veto";
      const said = c.tier === "veto" ? kind : axis;
      card.querySelector(".criterion-label").textContent = said.value ? said.selectedOptions[0].textContent : "";
    }

    _renderMarks(card, c, edits) {
      const marks = card.querySelector(".criterion-marks");
      marks.replaceChildren(...edits.map((what) => make("span", "pill warn", words("mark_" + what))));
      const was = card.querySelector(".criterion-was");
      const before = this.byId.get(c.id);
      was.hidden = !before || before.text === c.text;
      if (!was.hidden) Review.showChanges(was.querySelector("span"), before.text, c.text);
    }

    _renderHint(card, c) {
      const before = this.byId.get(c.id);
      const changed = c.text.trim() && (!before || before.text !== c.text);
      const codes = changed ? this.hints.get(c.text) : [];
      const hint = card.querySelector(".criterion-hint");
      hint.hidden = !codes || !codes.length;
      hint.textContent = (codes || []).map((code) => words("hint_" + code)).join(" ");
      if (changed && !codes) this._askHints();
    }

    /* What was removed stays in view, struck through, and can be put back. */
    _renderRemoved(edits) {
      for (const tier of D.TIERS) {
        const gone = edits.filter((e) => e.what === "removed" && this.byId.get(e.criterion).tier === tier);
        const box = this.tierPart(tier, "removed");
        box.hidden = !gone.length;
        box.replaceChildren(
          ...gone.map((e) => {
            const line = make("li", "removed");
            const back = make("button", "quiet", words("put_back"));
            back.type = "button";
            const text = this.byId.get(e.criterion).text;
            back.setAttribute("aria-label", `${words("put_back")}: ${text}`);
            back.addEventListener("click", () => this.restore(e.criterion));
            line.append(make("del", "", text), back);
            return line;
          }),
        );
      }
    }

    _renderBar(edits) {
      const accept = this.root.querySelector("[data-do=accept]");
      const label = edits.length ? words("accept_edits", { n: edits.length }) : words("accept");
      accept.querySelector("span").textContent = label;
      const reason = this.part("reason");
      if (reason.value !== this.answer.reason) reason.value = this.answer.reason;
      this.part("disputed").checked = this.answer.disputed;
      if (this.locked) return;
      this.root.querySelector("[data-do=undo]").disabled = !this.past.length;
      this.root.querySelector("[data-do=redo]").disabled = !this.future.length;
    }

    _markCurrent() {
      for (const [id, card] of this.cards) {
        const now = id === this.current;
        card.classList.toggle("current", now);
        card.tabIndex = now || (!this.current && id === this.shownOrder()[0]) ? 0 : -1;
        this._fit(card.querySelector("textarea"));
      }
      const own = this.inTier("proficiency");
      [...this.tierPart("proficiency", "shares").children].forEach((piece, i) => {
        piece.dataset.current = own[i] && own[i].id === this.current ? "yes" : "";
      });
    }

    _fit(text) {
      if (CSS.supports("field-sizing", "content")) return;
      text.style.height = "auto";
      text.style.height = `${text.scrollHeight + 2}px`;
    }
  }
  Review.RubricView = RubricView;
})();
