"""Texts of the rubric rounds and of saving, English and Chinese; merged by `wording`."""

from __future__ import annotations

__all__ = ["WORDING"]

_AUTOSAVE = {
    "saved": ("Saved", "已保存"),
    "saving": ("Saving …", "正在保存……"),
    "unsent": ("Not saved yet – will be sent", "尚未保存，将自动发送"),
    "unsent_long": (
        "No connection. Your work is kept in this browser and will be sent when the connection is "
        "back. You can go on working; please keep this page open.",
        "连接已断开。您的内容已保留在本浏览器中，恢复连接后会自动发送。您可以继续填写，请不要关闭本页。",
    ),
    "signin": ("Not saved yet – please log in", "尚未保存，请重新登录"),
    "signin_long": (
        "You have been logged out. Your work is kept in this browser. Log in again in a new tab; "
        "this page then sends it by itself.",
        "您已退出登录。您的内容已保留在本浏览器中。请在新标签页中重新登录，本页随后会自动发送。",
    ),
    "refused": ("Not saved", "未保存"),
    "refused_long": (
        "This could not be saved. Your work is kept in this browser.",
        "无法保存。您的内容已保留在本浏览器中。",
    ),
    "conflict": ("Two versions – please choose", "有两个版本，请选择"),
    "elsewhere": (
        "This item is also open in another window. Please work in one of them.",
        "本条目也在另一个窗口中打开。请只在其中一个窗口中填写。",
    ),
    "conflict_title": ("Two versions of this item", "本条目有两个版本"),
    "conflict_explain": (
        "This item was also changed in another window. Nothing has been overwritten. Choose for "
        "each difference which one to keep.",
        "本条目在另一个窗口中也被修改过。没有任何内容被覆盖。请逐项选择要保留的版本。",
    ),
    "conflict_mine": ("This window", "本窗口"),
    "conflict_theirs": ("Saved from another window", "另一窗口保存的版本"),
    "conflict_use": ("Keep what I chose", "保留所选内容"),
    "conflict_all_mine": ("Keep all of this window", "全部保留本窗口的内容"),
    "conflict_all_theirs": ("Keep all of the other", "全部保留另一窗口的内容"),
    "nothing": ("(nothing)", "（无）"),
}

WORDING: dict[str, dict[str, str]] = {
    f"{part}.{name}": {"en": english, "zh": chinese}
    for part, texts in {"autosave": _AUTOSAVE}.items()
    for name, (english, chinese) in texts.items()
}
