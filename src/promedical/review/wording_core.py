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
    "core.login": {"en": "Log in", "zh": "登录"},
    "core.welcome": {"en": "Welcome", "zh": "欢迎"},
    "core.welcome_what": {
        "en": (
            "Here physicians correct the criteria by which medical answers are judged, and "
            "judge such answers independently of each other."
        ),
        "zh": "在这里，医生修订评判医疗回答的标准，并彼此独立地评判这些回答。",
    },
    "core.patient_short": {"en": "No patient data.", "zh": "请勿输入患者数据。"},
    "core.patient_long": {
        "en": (
            "Never enter or upload anything by which a patient could be recognised: names, "
            "dates of birth, addresses, record numbers, photographs. If you see such data in "
            "an item, do not copy it; tell the lead."
        ),
        "zh": (
            "切勿输入或上传任何可识别患者身份的内容：姓名、出生日期、住址、病历号、照片等。如在条"
            "目中看到此类数据，请勿复制，并告知负责人。"
        ),
    },
    "core.login_name": {"en": "Login", "zh": "登录名"},
    "core.login_choose": {
        "en": "Login (your e-mail address, or another name)",
        "zh": "登录名（邮箱地址或其他名称）",
    },
    "core.password": {"en": "Password", "zh": "密码"},
    "core.log_in": {"en": "Log in", "zh": "登录"},
    "core.no_account": {
        "en": (
            "You need an invitation link from the lead of your group to get an account. "
            "Forgotten your password? The lead can send you a new link."
        ),
        "zh": "您需要负责人发送的邀请链接才能注册。忘记密码？负责人可以向您发送新的链接。",
    },
    "core.login_wrong": {
        "en": "Login and password do not belong together.",
        "zh": "登录名或密码不正确。",
    },
    "core.login_limited": {
        "en": "Too many attempts. Please wait {minutes} minutes and try again.",
        "zh": "尝试次数过多。请等待 {minutes} 分钟后重试。",
    },
    "core.login_bad": {
        "en": "Please choose a login of 2 to 200 characters.",
        "zh": "请选择 2 至 200 个字符的登录名。",
    },
    "core.login_taken": {
        "en": "This login is taken. Please choose another.",
        "zh": "该登录名已被使用，请另选一个。",
    },
    "core.name_bad": {
        "en": "Please give your name, at most 200 characters.",
        "zh": "请填写您的姓名，最多 200 个字符。",
    },
    "core.role_bad": {"en": "There is no such role.", "zh": "没有该角色。"},
    "core.language_bad": {"en": "There is no such language.", "zh": "没有该语言。"},
    "core.year_bad": {
        "en": "Year of the licence: please give a year from 1940 to {year}, or leave it empty.",
        "zh": "执业年份：请填写 1940 至 {year} 之间的年份，或留空。",
    },
    "core.profile_bad": {
        "en": "Specialty and country: at most 100 characters each.",
        "zh": "专科和国家：各不超过 100 个字符。",
    },
    "core.person_gone": {"en": "There is no such person.", "zh": "没有该人员。"},
    "core.last_lead": {
        "en": "This is the only lead. Make somebody else a lead first.",
        "zh": "这是唯一的负责人。请先指定另一位负责人。",
    },
    "core.password_short": {
        "en": "The password is too short: at least {shortest} characters, please.",
        "zh": "密码太短：请至少输入 {shortest} 个字符。",
    },
    "core.password_long": {
        "en": "The password is too long: at most {longest} characters, please.",
        "zh": "密码太长：请最多输入 {longest} 个字符。",
    },
    "core.password_common": {
        "en": (
            "This password is easily guessed. Three or four words that do not belong together"
            " are good."
        ),
        "zh": "该密码容易被猜到。建议使用三四个互不相关的词。",
    },
    "core.password_name": {
        "en": "The password is little more than your name or login. Please choose another.",
        "zh": "密码与您的姓名或登录名过于相似，请另选一个。",
    },
    "core.password_wrong": {"en": "The current password is not right.", "zh": "当前密码不正确。"},
    "core.password_twice": {
        "en": "The two passwords are not the same.",
        "zh": "两次输入的密码不一致。",
    },
    "core.password_new": {"en": "New password", "zh": "新密码"},
    "core.password_again": {"en": "The same password again", "zh": "再次输入密码"},
    "core.password_current": {"en": "Current password", "zh": "当前密码"},
    "core.password_hint": {
        "en": (
            "At least {shortest} characters. A few words that do not belong together are easy"
            " to keep and hard to guess."
        ),
        "zh": "至少 {shortest} 个字符。几个互不相关的词既好记又难猜。",
    },
    "core.password_set": {"en": "Set the password and log in", "zh": "设置密码并登录"},
    "core.password_change": {"en": "Change the password", "zh": "修改密码"},
    "core.invitation": {"en": "Invitation", "zh": "邀请"},
    "core.invitation_title": {"en": "Make your account", "zh": "创建账户"},
    "core.invitation_what": {"en": "You are invited as: {role}.", "zh": "您受邀担任：{role}。"},
    "core.reset_title": {"en": "Choose a new password", "zh": "设置新密码"},
    "core.invitation_gone": {
        "en": "This link was used already, has ended, or was never one.",
        "zh": "此链接已被使用、已过期或无效。",
    },
    "core.invitation_gone_title": {"en": "This link no longer works", "zh": "链接已失效"},
    "core.your_name": {"en": "Your name", "zh": "您的姓名"},
    "core.name_hint": {
        "en": "Shown to your group's lead alone. It is in no export.",
        "zh": "仅负责人可见，不会出现在任何导出文件中。",
    },
    "core.account_make": {"en": "Make the account", "zh": "创建账户"},
    "core.account": {"en": "Your account", "zh": "您的账户"},
    "core.about_you": {"en": "About you", "zh": "关于您"},
    "core.language": {"en": "Language", "zh": "语言"},
    "core.specialty": {"en": "Specialty", "zh": "专科"},
    "core.country": {"en": "Country", "zh": "国家"},
    "core.licensed_since": {"en": "Licensed since (year)", "zh": "执业起始年份"},
    "core.licensed_hint": {
        "en": "From 1940 to {year}; may be left empty.",
        "zh": "1940 至 {year}，可留空。",
    },
    "core.profile_why": {
        "en": (
            "Specialty, country and years of experience go into exports beside a random id, "
            "never your name."
        ),
        "zh": "专科、国家和执业年限会与随机编号一起导出，绝不包含您的姓名。",
    },
    "core.profile_saved": {"en": "Saved.", "zh": "已保存。"},
    "core.keep": {"en": "Save", "zh": "保存"},
    "core.role_reviewer": {"en": "reviewer", "zh": "审阅者"},
    "core.role_adjudicator": {"en": "adjudicator", "zh": "裁定者"},
    "core.role_lead": {"en": "lead", "zh": "负责人"},
    "core.link_invite": {"en": "Invitation as {role}", "zh": "邀请链接（{role}）"},
    "core.link_reset": {"en": "Link for a new password", "zh": "设置新密码的链接"},
    "core.link_what": {
        "en": (
            "Send this link to one person. It works once, for {days} days, and is shown only now."
        ),
        "zh": "请将此链接发送给一个人。链接只能使用一次，{days} 天内有效，仅在此显示一次。",
    },
    "core.invite": {"en": "Make an invitation link", "zh": "生成邀请链接"},
    "core.invite_as": {"en": "Invite a", "zh": "邀请"},
    "core.invite_hint": {
        "en": "Adjudicators may decide as the third reader.",
        "zh": "裁定者可以担任第三位评审。",
    },
    "core.name": {"en": "Name", "zh": "姓名"},
    "core.role": {"en": "Role", "zh": "角色"},
    "core.years": {"en": "Years since licence", "zh": "执业年数"},
    "core.done_of": {"en": "Done / given", "zh": "完成 / 分配"},
    "core.seconds_criterion": {
        "en": "Seconds a criterion (median)",
        "zh": "每条标准用时（中位数，秒）",
    },
    "core.actions": {"en": "Actions", "zh": "操作"},
    "core.actions_for": {"en": "Actions for {name}", "zh": "对 {name} 的操作"},
    "core.change": {"en": "Change", "zh": "更改"},
    "core.inactive": {"en": "no access", "zh": "已停用"},
    "core.too_fast": {"en": "{seconds} s – under 2 s", "zh": "{seconds} 秒，低于 2 秒"},
    "core.pace_hint": {
        "en": (
            "Seconds a criterion: the time of a finished item over the judgments it asks for;"
            " the median over a person's items. Under 2 seconds nobody can have read."
        ),
        "zh": (
            "每条标准用时：完成一个条目的时间除以其评判数，取该人员所有条目的中位数。低于 2 秒"
            "说明不可能认真阅读。"
        ),
    },
    "core.role_set": {"en": "Set the role", "zh": "设置角色"},
    "core.reset": {"en": "Link for a new password", "zh": "新密码链接"},
    "core.deactivate": {"en": "Take access away", "zh": "停用账户"},
    "core.activate": {"en": "Give access back", "zh": "恢复账户"},
    "core.rounds": {"en": "Rounds", "zh": "轮次"},
    "core.round": {"en": "Round", "zh": "轮次"},
    "core.kind": {"en": "Kind", "zh": "类型"},
    "core.state": {"en": "State", "zh": "状态"},
    "core.items": {"en": "Items", "zh": "条目"},
    "core.progress": {"en": "Progress", "zh": "进度"},
    "core.kind_rubrics": {"en": "Rubrics to correct", "zh": "修订评分标准"},
    "core.kind_adjudication": {"en": "Answers to judge", "zh": "评判回答"},
    "core.task_rubrics": {
        "en": "Read the question, correct its criteria, then accept or reject them.",
        "zh": "阅读问题，修订其评分标准，然后接受或拒绝。",
    },
    "core.task_adjudication": {
        "en": "Read the answers, say which is better, then judge every criterion.",
        "zh": "阅读回答，先选出更好的，再逐条评判。",
    },
    "core.state_open": {"en": "open", "zh": "进行中"},
    "core.state_closed": {"en": "closed", "zh": "已结束"},
    "core.done_count": {"en": "{done} of {all} done", "zh": "已完成 {done} / {all}"},
    "core.new_rubrics": {"en": "New round of rubrics", "zh": "新建评分标准轮次"},
    "core.new_adjudication": {"en": "New adjudication", "zh": "新建评判轮次"},
    "core.no_rounds": {
        "en": (
            "There is no round yet. Make one above, or import rows with “promedical review import”."
        ),
        "zh": ("还没有轮次。请在上方新建，或使用 “promedical review import” 导入。"),
    },
    "core.fast_title": {
        "en": "Answered too fast to have been read",
        "zh": "作答过快，可能未认真阅读",
    },
    "core.fast_line": {
        "en": "{seconds} seconds a criterion (median)",
        "zh": "每条标准 {seconds} 秒（中位数）",
    },
    "core.hello": {"en": "Good to see you, {name}", "zh": "您好，{name}"},
    "core.no_work": {
        "en": "Nothing is waiting for you. The lead of your group will give you items.",
        "zh": "目前没有待办任务。负责人会为您分配条目。",
    },
    "core.begin": {"en": "Begin", "zh": "开始"},
    "core.go_on": {"en": "Go on", "zh": "继续"},
    "core.all_done": {"en": "All done. Thank you.", "zh": "全部完成，谢谢。"},
    "core.all_items": {"en": "All items", "zh": "全部条目"},
    "core.item": {"en": "Item {number}", "zh": "条目 {number}"},
    "core.item_open": {"en": "not begun", "zh": "未开始"},
    "core.item_started": {"en": "begun", "zh": "进行中"},
    "core.item_done": {"en": "done", "zh": "已完成"},
    "core.part_third": {"en": "third reader", "zh": "第三位评审"},
    "core.storage_where": {
        "en": (
            "Everything is in one {kind} database ({name}) on the machine that runs this "
            "server. Nothing is sent anywhere else, and the pages load nothing from "
            "elsewhere."
        ),
        "zh": (
            "所有数据都在运行本服务器的机器上的一个 {kind} 数据库（{name}）中。不会"
            "向其他任何地方发送数据，页面也不加载任何外部内容。"
        ),
    },
    "core.storage_what": {"en": "What", "zh": "内容"},
    "core.storage_entries": {"en": "Entries", "zh": "条数"},
    "core.storage_holds": {"en": "Holds", "zh": "包含"},
    "core.storage_until": {"en": "Kept until", "zh": "保留至"},
    "core.stored_reviewer": {"en": "Accounts", "zh": "账户"},
    "core.stored_reviewer_holds": {
        "en": (
            "Name, login, a hash of the password (argon2), role, specialty, country, year of "
            "the licence"
        ),
        "zh": "姓名、登录名、密码哈希（argon2）、角色、专科、国家、执业年份",
    },
    "core.stored_reviewer_until": {
        "en": (
            "The lead takes access away; who the person is can be removed, and the answers then"
            " refer to a random id alone"
        ),
        "zh": "负责人可停用账户；身份信息可被删除，此后作答仅引用随机编号",
    },
    "core.stored_item": {"en": "Items", "zh": "条目"},
    "core.stored_item_holds": {
        "en": (
            "Instructions, references, rubrics, answers of models; apart from them and never "
            "sent to a reviewer: which model wrote an answer, and what a judge said"
        ),
        "zh": (
            "问题、参考答案、评分标准、模型的回答；另外单独保存且绝不发送给审阅者的：回答出自哪个"
            "模型，以及评判模型的判断"
        ),
    },
    "core.stored_item_until": {"en": "Purged by record or by age", "zh": "按记录或按时间清除"},
    "core.stored_assignment": {"en": "Answers of reviewers", "zh": "审阅者的作答"},
    "core.stored_assignment_holds": {
        "en": "Corrected rubrics, judgments, notes, time spent",
        "zh": "修订后的标准、评判、备注、用时",
    },
    "core.stored_assignment_until": {"en": "Purged with their item", "zh": "随条目一并清除"},
    "core.stored_change": {"en": "Changes", "zh": "更改记录"},
    "core.stored_change_holds": {
        "en": "Who changed what, when, from what to what",
        "zh": "谁在何时将什么改成了什么",
    },
    "core.stored_change_until": {"en": "Purged with their item", "zh": "随条目一并清除"},
    "core.stored_audit_event": {"en": "Audit log", "zh": "审计日志"},
    "core.stored_audit_event_holds": {
        "en": "Who did what to which id, when; salted hashes; no content and no names",
        "zh": "谁在何时对哪个编号做了什么；加盐哈希；不含内容和姓名",
    },
    "core.stored_audit_event_until": {
        "en": "For ever; every entry seals the one before it",
        "zh": "永久保留；每条记录都锁定前一条",
    },
    "core.storage_browser": {"en": "In your browser", "zh": "在您的浏览器中"},
    "core.storage_browser_what": {
        "en": (
            "A cookie that keeps you logged in for {hours} hours at most, or {idle} hours "
            "without a click; your language; and what you have written and the server has not"
            " confirmed yet, until it has."
        ),
        "zh": (
            "一个用于保持登录的 Cookie（最长 {hours} 小时，或 {idle} 小时"
            "无操作）；您的语言；以及您已填写但服务器尚未确认的内容，确认后即删除。"
        ),
    },
    "core.storage_out": {"en": "What leaves", "zh": "导出的内容"},
    "core.storage_out_what": {
        "en": (
            "Only what the lead exports: gold rubrics and verdicts, every vote beside a "
            "random reviewer id, specialty, country and years of experience. No names and no "
            "logins. Files that were exported are outside this database; a purge does not "
            "reach them."
        ),
        "zh": (
            "仅限负责人导出的内容：金标准评分标准和评判，每票附随机审阅者编号、专科、国家和执业年"
            "限，不含姓名和登录名。已导出的文件不在本数据库中，清除操作不会影响它们。"
        ),
    },
    "core.storage_erase": {"en": "How it is removed", "zh": "如何删除"},
    "core.storage_erase_what": {
        "en": (
            "Whoever runs the server removes an instruction with all its answers and changes,"
            " by id or by age, or who a person is: name, login, password, specialty, country, "
            "licence. It is overwritten in the database; the audit log stays whole and keeps "
            "neither text nor a hash that could be matched with one. Backups are yours to remove."
        ),
        "zh": (
            "服务器管理员可按编号或时间删除某个问题及其全部作答和更改记录，也可删除某人的身份信息"
            "（姓名、登录名、密码、专科、国家、执业年份）。数据库中的内容会被覆盖；审计日志保持完整，既不含文本，也不含可与文本比对的哈希。备份需自行删除。"
        ),
    },
}
