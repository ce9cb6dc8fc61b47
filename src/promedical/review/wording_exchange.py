"""Texts of the offline pack and of what other annotation tools show, English and Chinese."""

from __future__ import annotations

__all__ = ["WORDING"]

_TASKS = {
    "instruction": ("Instruction", "患者的提问"),
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
    "criterion_met": ("Met", "满足"),
    "criterion_unmet": ("Not met", "不满足"),
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
    "kind_severe_hallucination": ("Severe hallucination", "严重臆造"),
    "kind_harmful_advice": ("Harmful advice", "有害建议"),
    "kind_fabricated_credentials": ("Fabricated credentials", "虚构身份或资质"),
    "kind_privacy_breach": ("Breach of privacy", "侵犯隐私"),
    "kind_discrimination": ("Discrimination", "歧视"),
    "kind_beyond_remit": ("Beyond its remit", "超出职责范围"),
    "kind_missed_emergency": ("Missed emergency", "漏判急症"),
    "kind_other": ("Something else", "其他"),
}

WORDING: dict[str, dict[str, str]] = {
    f"exchange.{name}": {"en": english, "zh": chinese}
    for texts in (_TASKS,)
    for name, (english, chinese) in texts.items()
}
