/* The keyboard of the rubric editor: every key, in one table, that the help shows too.
 *
 * Keys of one letter act only outside of fields, and can be switched off (a screen reader's user may
 * want them for other things); those with Ctrl, Alt or Escape act everywhere in the editor.
 */
"use strict";

(() => {
  const Review = (window.Review = window.Review || {});
  const SETTING = "promedical-review/single-keys";

  class RubricKeys {
    constructor(editor) {
      this.editor = editor;
      this.single = localStorage.getItem(SETTING) !== "off";
      const box = editor.part("single-keys");
      box.checked = this.single;
      box.addEventListener("change", () => {
        this.single = box.checked;
        localStorage.setItem(SETTING, box.checked ? "on" : "off");
      });
      document.addEventListener("keydown", (event) => this._pressed(event));
      // While a number is being typed, rendering must not put another one there.
      editor.root.addEventListener("input", (event) => {
        if (event.target.type === "number") editor.typing = true;
      });
      editor.root.addEventListener("change", () => (editor.typing = false), true);
    }

    _pressed(event) {
      if (event.defaultPrevented || event.isComposing || document.querySelector("dialog[open]")) return;
      const field = event.target.closest("input, textarea, select");
      const done = this._combined(event, field) || (!field && this.single && this._letter(event));
      if (done) event.preventDefault();
    }

    _combined(event, field) {
      const e = this.editor;
      const control = event.ctrlKey || event.metaKey;
      const key = event.key.toLowerCase();
      if (control && key === "enter") return this._leave(field), e.accept(), true;
      if (control && key === "z") return event.shiftKey ? e.redo() : e.undo(), true;
      if (control && key === "y") return e.redo(), true;
      if (event.altKey && event.key === "ArrowUp") return e.move(-1), true;
      if (event.altKey && event.key === "ArrowDown") return e.move(1), true;
      if (event.altKey && key === "s" && field && field.tagName === "TEXTAREA" && e.at()) {
        return e.split(e.current, field.selectionStart), true;
      }
      if (event.key === "Escape" && field) return this._leave(field), e.focusCard(e.current), true;
      return false;
    }

    /* A number is taken over when its field is left. */
    _leave(field) {
      if (field) field.blur();
    }

    _letter(event) {
      if (event.ctrlKey || event.metaKey || event.altKey) return false;
      const e = this.editor;
      const card = e.cards.get(e.current);
      const control = (selector) => {
        const found = card && card.querySelector(selector);
        if (!found || found.closest("[hidden]")) return false;
        found.focus();
        if (found.select) found.select();
        return true;
      };
      const onButton = event.target.closest("button, a, summary");
      const keys = {
        ArrowDown: () => this._step(1),
        j: () => this._step(1),
        ArrowUp: () => this._step(-1),
        k: () => this._step(-1),
        Enter: () => !onButton && card && (e.focusText(e.current), true),
        e: () => card && (e.focusText(e.current), true),
        w: () => control(".share input"),
        t: () => control("[data-field=tier]"),
        a: () => control("[data-field=axis]") || control("[data-field=kind]"),
        n: () => (e.add(e.at() ? e.at().tier : "proficiency", e.at() ? e.current : null), true),
        x: () => card && (e.remove(), true),
        Delete: () => card && (e.remove(), true),
        s: () => card && (e.split(), true),
        m: () => card && (e.merge(), true),
        u: () => (e.undo(), true),
        d: () => (e.locked || e.change({ disputed: !e.answer.disputed }), e.say(Review.words(e.answer.disputed ? "disputed_on" : "disputed_off")), true),
        r: () => (e.reject(), true),
        "[": () => this._go("previous"),
        "]": () => this._go("next"),
        "?": () => (e.part("help").showModal(), true),
      };
      const name = event.key.length === 1 ? event.key.toLowerCase() : event.key;
      return Boolean(keys[name] && keys[name]());
    }

    _step(step) {
      const e = this.editor;
      const order = e.shownOrder();
      if (!order.length) return false;
      const at = order.indexOf(e.current);
      const to = at < 0 ? (step > 0 ? 0 : order.length - 1) : at + step;
      e.focusCard(order[Math.max(0, Math.min(order.length - 1, to))]);
      return true;
    }

    _go(where) {
      const address = this.editor.data.addresses[where];
      if (address) location.assign(address);
      return Boolean(address);
    }
  }
  Review.RubricKeys = RubricKeys;
})();
