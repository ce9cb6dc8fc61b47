"""Text of the frame, the login, the home pages, people and storage."""

from __future__ import annotations

__all__ = ["WORDING"]

WORDING: dict[str, dict[str, str]] = {
    "core.app": {"en": "ProMedical review", "zh": "ProMedical 审阅"},
    "core.skip": {"en": "Skip to content", "zh": "跳到正文"},
    "core.navigation": {"en": "Main", "zh": "主导航"},
    "core.home": {"en": "My work", "zh": "我的任务"},
    "core.people": {"en": "People", "zh": "人员"},
    "core.storage": {"en": "What is stored", "zh": "数据存储"},
    "core.logout": {"en": "Log out", "zh": "退出"},
    "core.to_start": {"en": "To the start page", "zh": "返回首页"},
    "core.demo_band": {
        "en": "This is a demo. Do not enter anything about real patients.",
        "zh": "这是演示。请勿输入任何真实患者的信息。",
    },
    "core.foot": {
        "en": "Research use only; not a medical device. Never enter data by which a patient could "
        "be recognised.",
        "zh": "仅供研究使用，不是医疗器械。切勿输入任何可识别患者身份的数据。",
    },
    "core.error_forbidden": {"en": "Not for this account", "zh": "此账户无权访问"},
    "core.error_forbidden_what": {
        "en": "This page is for another role. Ask the lead of your group if you need it.",
        "zh": "此页面供其他角色使用。如有需要，请联系负责人。",
    },
    "core.error_bad_token": {"en": "Please try again", "zh": "请重试"},
    "core.error_bad_token_what": {
        "en": "The page was too old, or came from another window. Nothing was changed. Go back, "
        "reload the page and try again.",
        "zh": "页面已过期，或来自其他窗口。未作任何更改。请返回、刷新页面后重试。",
    },
    "core.error_not_found": {"en": "Nothing here", "zh": "页面不存在"},
    "core.error_not_found_what": {
        "en": "This page does not exist, or it is not yours.",
        "zh": "此页面不存在，或不属于您。",
    },
    "core.error_invalid": {"en": "That could not be read", "zh": "无法读取提交的内容"},
    "core.error_invalid_what": {
        "en": "Something in the form was missing or not as expected. Nothing was changed.",
        "zh": "表单内容缺失或不符合要求。未作任何更改。",
    },
    "core.error_fault": {"en": "A fault of the program", "zh": "程序错误"},
    "core.error_fault_what": {
        "en": "Nothing that was saved is lost. Try again; if it happens again, tell the lead.",
        "zh": "已保存的内容不会丢失。请重试；若再次出现，请告知负责人。",
    },
}
