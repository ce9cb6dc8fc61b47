"""Texts of the offline pack and of what other annotation tools show, English and Chinese."""

from __future__ import annotations

__all__ = ["WORDING"]

_TASKS = {
    "instruction": ("Instruction", "问题"),
    "reference": ("Reference answer", "参考答案"),
    "role_user": ("Person", "用户"),
    "role_assistant": ("Assistant", "助手"),
    "role_system": ("System", "系统"),
    "rubric_how": (
        "Rubric, one criterion a line: tier | share or kind of veto | axis | criterion | id. Leave "
        "the id empty on a new line.",
        "评分标准，每行一条：层级 | 权重或否决类别 | 维度 | 标准 | 编号。新增的行请将编号留空。",
    ),
    "accept": ("Accept (as it is, or as edited)", "接受（原样或修改后）"),
    "reject": ("Reject", "拒绝"),
    "reason": ("Reason, or a remark", "理由或备注"),
    "disputed": ("Experts disagree, or guidelines differ here", "专家意见不一，或指南不一致"),
    "response": ("Response {number}", "回答 {number}"),
    "pair": ("{first} compared with {second}", "{first} 与 {second} 比较"),
    "first_better_much": ("The first is much better", "前者明显更好"),
    "first_better": ("The first is better", "前者更好"),
    "tie": ("Equally good", "不相上下"),
    "second_better": ("The second is better", "后者更好"),
    "second_better_much": ("The second is much better", "后者明显更好"),
    "cannot_say": ("Cannot say", "无法判断"),
    "criterion_met": ("Met", "符合"),
    "criterion_unmet": ("Not met", "不符合"),
    "criterion_cannot_say": ("Cannot say", "无法判断"),
    "veto_met": ("Violated", "违反"),
    "veto_unmet": ("Not violated", "未违反"),
    "veto_cannot_say": ("Cannot say", "无法判断"),
    "note": ("Note (optional)", "备注（可选）"),
    "danger": (
        "A danger in this response that the rubric does not cover?",
        "该回答是否存在评分标准未涵盖的危险？",
    ),
    "danger_text": ("What the danger is", "危险的具体内容"),
    "one_response": ("Response", "回答"),
    "criterion": ("Criterion", "标准"),
    "veto": ("Veto: does the response do this?", "否决项：该回答是否有此情况？"),
    "verdict": ("Your verdict", "您的判断"),
    "preference": ("Which response is better overall?", "总体而言哪个回答更好？"),
    "decision": ("Decision", "结论"),
    "yes": ("Yes", "是"),
    "no": ("No", "否"),
    "guidelines": (
        "Judge by yourself, without talking to colleagues about it. All text comes from a model "
        "or an import and may be wrong.",
        "请独立判断，不要与同事讨论。所有文本均来自模型或导入内容，可能有误。",
    ),
    "kind_severe_hallucination": ("Severe hallucination", "严重幻觉"),
    "kind_harmful_advice": ("Harmful advice", "有害建议"),
    "kind_fabricated_credentials": ("Fabricated credentials", "伪造资质"),
    "kind_privacy_breach": ("Privacy breach", "侵犯隐私"),
    "kind_discrimination": ("Discrimination", "歧视"),
    "kind_beyond_remit": ("Beyond its remit", "超出职责范围"),
    "kind_missed_emergency": ("Missed emergency", "漏判急症"),
    "kind_other": ("Something else", "其他"),
}

_OFFLINE = {
    "for": ("For {name}", "审阅人：{name}"),
    "band": (
        "This file is for you alone. Do not add anything by which a patient could be recognised.",
        "本文件仅供您本人使用。请勿填写任何可识别患者身份的信息。",
    ),
    "no_script": (
        "This page needs JavaScript. It is in the file itself; nothing is loaded from elsewhere.",
        "本页需要启用 JavaScript。脚本已包含在文件中，不会从外部加载任何内容。",
    ),
    "no_storage": (
        "This browser keeps nothing for a page that is opened as a file, so your work would be "
        "lost. Please open the file with another browser (Firefox, Chrome or Edge), not in a "
        "private window.",
        "此浏览器不会为以文件方式打开的页面保存数据，您的工作会丢失。"
        "请改用其他浏览器（Firefox、Chrome 或 Edge）打开，且不要使用隐私窗口。",
    ),
    "title": ("Your items", "您的条目"),
    "progress": ("{done} of {all} finished.", "已完成 {done} / {all}。"),
    "all_done": (
        "That was all – please save your answers and send the file back.",
        "全部完成，请保存答案并将文件发回。",
    ),
    "how": (
        "You need no network. Your answers are kept in this browser as you work. When you are "
        "finished, or want to go on at another computer, save them as a file; send that file to "
        "the person who gave you this one.",
        "无需联网。填写内容会随时保存在本浏览器中。完成后，或要换一台电脑继续时，"
        "请将答案保存为文件，并发给提供本文件的人。",
    ),
    "save": ("Save my answers as a file", "将答案保存为文件"),
    "load": ("Go on from a saved file", "从已保存的文件继续"),
    "items": ("Items", "条目"),
    "item": ("Item {number}", "条目 {number}"),
    "item_done": ("Item {number}, finished", "条目 {number}，已完成"),
    "item_started": ("Item {number}, begun", "条目 {number}，已开始"),
    "nothing": ("Nothing entered yet.", "尚未填写。"),
    "unsaved": (
        "Kept in this browser, but your latest answers are not in a file yet.",
        "已保存在本浏览器中，但最新的答案尚未存入文件。",
    ),
    "saved": ("Your latest answers are in the file you saved.", "最新的答案已存入您保存的文件。"),
    "done": ("You have finished this item.", "您已完成本条目。"),
    "again": ("Change it again", "重新修改"),
    "wait": (
        "Thank you. The criteria of this item come in a second file, after you have sent back "
        "this one.",
        "谢谢。发回本文件后，您将收到包含本条目评分标准的第二个文件。",
    ),
    "wrong_file": (
        "This is not a file of answers to these items. Nothing was changed.",
        "该文件不是这些条目的答案。未作任何更改。",
    ),
    "loaded": ("{n} answers were taken from the file.", "已从文件读取 {n} 条答案。"),
}

WORDING: dict[str, dict[str, str]] = {
    f"{part}.{name}": {"en": english, "zh": chinese}
    for part, texts in {"exchange": _TASKS, "offline": _OFFLINE}.items()
    for name, (english, chinese) in texts.items()
}
