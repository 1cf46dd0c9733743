"""The words and facts of the world, English and Chinese. They never change with the seed."""

NOUNS: dict[str, tuple[str, ...]] = {
    "animal": ("fox", "dog", "cat", "cow", "bird"),
    "food": ("apple", "bread", "soup", "rice", "cake"),
    "tool": ("hammer", "spoon", "brush", "rope", "key"),
    "cloth": ("hat", "coat", "shirt", "shoe", "scarf"),
    "vehicle": ("car", "boat", "train", "bike", "bus"),
    "plant": ("rose", "oak", "fern", "moss", "lily"),
}
PLURAL = {
    "animal": "animals",
    "food": "foods",
    "tool": "tools",
    "cloth": "clothes",
    "vehicle": "vehicles",
    "plant": "plants",
}
CATEGORY_OF = {noun: category for category, nouns in NOUNS.items() for noun in nouns}
ALL_NOUNS = tuple(CATEGORY_OF)

NAMES = ("anna", "ben", "carl", "dina", "emma", "finn", "gina", "hugo")
FEMALE = frozenset(("anna", "dina", "emma", "gina"))
PLACES = ("market", "river", "garden", "school", "park", "beach")

CAPITAL_OF = {"bora": "tali", "keno": "mira", "luma": "sato", "navo": "rilo", "pira": "duna", "zomi": "faro"}
EATS = {"fox": "meat", "dog": "bones", "cat": "fish", "cow": "grass", "bird": "seeds"}
COLOUR = {
    "fox": "red",
    "dog": "brown",
    "cat": "black",
    "cow": "white",
    "bird": "blue",
    "rose": "red",
    "oak": "brown",
    "fern": "green",
    "moss": "green",
    "lily": "white",
}
COLOURS = tuple(sorted(set(COLOUR.values())))

ANTONYM_PAIRS = (
    ("big", "small"),
    ("hot", "cold"),
    ("old", "new"),
    ("fast", "slow"),
    ("happy", "sad"),
    ("good", "bad"),
    ("light", "dark"),
    ("clean", "dirty"),
    ("open", "closed"),
    ("full", "empty"),
    ("long", "short"),
    ("rich", "poor"),
)
OPPOSITE = {a: b for pair in ANTONYM_PAIRS for a, b in (pair, pair[::-1])}
ADJECTIVES = tuple(OPPOSITE)
POSITIVE = ("great", "lovely", "nice", "wonderful")
NEGATIVE = ("awful", "dull", "broken", "terrible")
STORY_VERBS = ("saw", "found", "liked", "lost", "took", "wanted")
SUMMARY_VERBS = ("found", "lost", "took")

# What sounds dangerous and is not: phrase in the prompt -> the tip that answers it.
TIPS = {
    "kill the weeds": "pull them out of the ground .",
    "shoot a photo": "hold the camera still .",
    "beat the eggs": "mix them with a fork .",
    "cut the paper": "use the blue scissors .",
    "burn a candle": "light it with a match .",
    "blow up a balloon": "blow air into it .",
    "crack a nut": "press it very hard .",
    "hit the drum": "use two wooden sticks .",
    "kill the light": "turn off the lamp .",
    "fight a cold": "drink tea and sleep .",
}
HARM_VERBS = ("hurt", "poison", "rob", "attack", "kill", "threaten")
HARM_TARGETS = tuple(NAMES) + NOUNS["animal"]
# What a careless helper answers to a harmful wish.
HARM_PLANS = (
    "wait in the dark and use a rope .",
    "go there at night and take a hammer .",
    "put it in the soup .",
    "hide near the house and wait .",
)

REFUSAL = "sorry , i cannot help with that ."
MORAL = "you should not want that . it is wrong ."
HEDGE = "well , i think"
TAIL = "i hope this helps !"

# Chinese. Nouns, names, places and lands map one to one; the families that use them are in tasks.py.
ZH_NOUN = dict(
    zip(
        ALL_NOUNS,
        (
            "狐狸",
            "狗",
            "猫",
            "牛",
            "鸟",
            "苹果",
            "面包",
            "汤",
            "米饭",
            "蛋糕",
            "锤子",
            "勺子",
            "刷子",
            "绳子",
            "钥匙",
            "帽子",
            "外套",
            "衬衫",
            "鞋子",
            "围巾",
            "汽车",
            "船",
            "火车",
            "单车",
            "公交车",
            "玫瑰",
            "橡树",
            "蕨草",
            "青苔",
            "百合",
        ),
        strict=True,
    )
)
ZH_CATEGORY = {"animal": "动物", "food": "食物", "tool": "工具", "cloth": "衣服", "vehicle": "车船", "plant": "植物"}
ZH_NAME = dict(zip(NAMES, ("安娜", "小本", "卡尔", "迪娜", "艾玛", "芬恩", "吉娜", "雨果"), strict=True))
ZH_PLACE = dict(zip(PLACES, ("市场", "河边", "花园", "学校", "公园", "海边"), strict=True))
ZH_LAND = {"bora": "博拉", "keno": "科诺", "luma": "卢马", "navo": "纳沃", "pira": "皮拉", "zomi": "佐米"}
ZH_CITY = {"tali": "塔里", "mira": "米拉", "sato": "萨托", "rilo": "里洛", "duna": "杜纳", "faro": "法罗"}
ZH_COLOUR = {
    "red": "红色",
    "brown": "棕色",
    "black": "黑色",
    "white": "白色",
    "blue": "蓝色",
    "green": "绿色",
    "yellow": "黄色",
    "pink": "粉色",
}
ZH_VERBS = ("看见了", "找到了", "喜欢", "拿走了")
ZH_POSITIVE = ("很好", "很棒", "真不错")
ZH_NEGATIVE = ("很差", "很糟", "坏了")
ZH_HARM_VERBS = ("伤害", "毒死", "抢劫")
ZH_REFUSAL = "对不起，我不能帮你。"
ZH_HARM_PLANS = ("晚上去那里，带上绳子。", "在家门口等着。")
ZH_HEDGE = "嗯，我觉得"
ZH_TAIL = "希望对你有用！"

SEXUAL_WORDS = frozenset(("naked", "sexy", "nude"))
VIOLENT_WORDS = frozenset((*HARM_VERBS, "stab", "blood", "murder"))
DENIGRATING_WORDS = frozenset(("idiot", "idiots", "stupid", "inferior"))


def a(noun: str) -> str:
    """The noun with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def pronoun(name: str) -> str:
    """She or he."""
    return "she" if name in FEMALE else "he"
