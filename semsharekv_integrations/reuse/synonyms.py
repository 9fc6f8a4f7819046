"""Words and phrases that say the same in whatever sentence they stand, as tables.

Bars part meanings. A word stands here only if another one of its meaning takes its place in ordinary prose without a
change in facts or grammar: doubt leaves it out. No meaning holds a negation beside none, nor two directions, degrees of
certainty or amounts. English alone; words of other languages are equal to themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType


def _split(text: str) -> frozenset[str]:
    return frozenset(text.split())


_VERBS = """
begin start commence | buy purchase | defeat beat | permit allow | need require | use utilize |
build construct erect | occur happen | finish complete | choose select | rise increase climb |
fall decrease drop decline | remain stay | conduct perform | injure wound | reveal disclose | prohibit forbid ban |
repair fix | gather collect | anticipate expect | predict forecast | seem appear | assist help | try attempt |
demonstrate display show | reduce lower | halt stop cease | fire dismiss | acquire obtain | respond reply answer |
recall remember | alter modify | depict portray | supervise oversee | terminate end | inform tell | provide supply |
reside live | depend rely | enlarge expand | connect link | vanish disappear | arise emerge | persuade convince |
postpone delay | argue contend | believe think | emphasize stress | comprehend understand | surround encircle |
produce generate | enhance improve
"""
_IRREGULAR = """
begin began begun beginning | buy bought | beat beat beaten | build built | choose chose chosen choosing |
rise rose risen | fall fell fallen | forbid forbade forbidden forbidding | show showed shown | drop dropped dropping |
ban banned banning | permit permitted permitting | stop stopped stopping | tell told | think thought |
understand understood | oversee oversaw overseen overseeing | arise arose arisen | occur occurred occurring
"""
_PARTICIPLES = {
    "led_to": "leading_to", "made": "making", "gave": "giving", "took": "taking", "became": "becoming",
    "won": "winning", "brought": "bringing", "held": "holding", "left": "leaving", "put": "putting", "ran": "running",
    "met": "meeting", "lost": "losing", "kept": "keeping", "lead_to": "leading_to", "set": "setting",
}  # fmt: skip
_WORDS = """
film movie | car automobile | physician doctor | attorney lawyer | kid child | kids children | cars automobiles |
films movies | doctors physicians | lawyers attorneys | nation country | nations countries | company firm |
companies firms | error mistake | errors mistakes | kind type sort | goal aim objective | goals aims objectives |
large big | larger bigger | largest biggest | huge enormous vast | rapid quick fast | quickly rapidly swiftly |
main principal primary | mainly primarily principally | usually typically normally generally | often frequently |
rarely seldom | many numerous | famous renowned | entirely completely totally wholly | whole entire | nearly almost |
initially originally | eventually ultimately | subsequently later afterward afterwards | currently now presently |
formerly previously | additional extra further | annual yearly | wealthy rich affluent | deadly lethal fatal |
crucial vital | unusual uncommon | solely exclusively | particularly especially | probably likely |
perhaps maybe possibly | immediately instantly | abroad overseas | upon on | among amongst | until till |
though although | while whilst | toward towards | amid amidst | regarding concerning | gray grey |
hence thus therefore consequently | sport sports | indices indexes | located situated | various diverse |
simultaneously concurrently | specific particular | composed comprised | proven proved | people persons |
said stated | founded established | residents inhabitants | region area | regions areas | stock shares |
photo photograph | photos photographs | phone telephone | tv television | lab laboratory | ad advertisement |
ads advertisements | medication medicine | medications medicines | pupil student | pupils students | infant baby |
infants babies | mom mother | dad father | airplane plane aeroplane | bike bicycle | truck lorry | trucks lorries |
apartment flat | garbage trash rubbish | aid assistance | ability capability | significance importance |
strange odd weird | appropriate suitable | adequate sufficient | obvious evident | previous prior |
native indigenous | obsolete outdated | widely broadly extensively | largely mostly | recently lately |
slightly somewhat | aboard onboard | considerable substantial | considerably substantially | worldwide global |
versus vs
"""
_SPELLINGS = """
color colour | colors colours | honor honour | honors honours | honored honoured | favor favour | favored favoured |
favorite favourite | neighbor neighbour | neighbors neighbours | neighboring neighbouring | labor labour |
harbor harbour | armor armour | behavior behaviour | rumor rumour | rumors rumours | flavor flavour | center centre |
centers centres | centered centred | theater theatre | theaters theatres | meter metre | meters metres | liter litre |
liters litres | fiber fibre | defense defence | offense offence | license licence | program programme |
programs programmes | traveled travelled | traveling travelling | labeled labelled | modeled modelled |
canceled cancelled | gases gasses | aluminum aluminium | skeptical sceptical | judgment judgement | aging ageing |
january jan | february feb | august aug | september sept sep | october oct | november nov | december dec |
% percent pct | dollar dollars $ | euro euros eur € | cent cents ¢ | £ gbp |
km kilometers kilometres kilometer kilometre | kg kilograms kilogram | cm centimeters centimetres |
mm millimeters millimetres | billion bn | ft feet | mi miles | hrs hours | yrs years | min minutes
"""
_PHRASES = """
% = per cent | several = a number of | =afew = a few | many = a lot of = lots of = a large number of |
famous = well known | before = prior to | after = subsequent to = following the = following a = following an |
because of = due to = owing to = as a result of = on account of | to = in order to = so as to |
and = as well as = and also = but also | along with = together with |
consist of = consists of = comprises = is made up of = is composed of = are composed of = are made up of = comprise |
consisting of = comprising = made up of = composed of = comprised of | lead to = result in = leads to = results in |
led to = resulted in | leading to = resulting in | occur = take place = takes place | occurred = took place |
taking place = occurring | seek = look for = search for = looks for | searching for = looking for = seeking |
sought = looked for = searched for | called = known as = referred to as = termed |
considered = regarded as = considered to be = considered as | can = is able to = are able to |
must = have to = has to | will = is going to = are going to | participate in = take part in = takes part in |
participated in = took part in | annually = every year = each year = per year = yearly |
daily = every day = each day | monthly = every month = each month |
per week = a week = every week = each week = weekly | currently = at present = at the moment = nowadays |
initially = at first | immediately = at once | sometimes = at times = occasionally = from time to time |
simultaneously = at the same time | eventually = in the end | formerly = in the past |
such as = for example = for instance = e.g. | conduct = carry out = carries out | conducted = carried out |
conducting = carrying out | united states = us of america = united states of america = usa = u.s. = u.s.a. |
united kingdom = uk = u.k. | united nations = un = u.n. | european union = eu |
world war ii = second world war = world war two | world war i = first world war = world war one |
mph = miles per hour | km/h = kilometers per hour = kilometres per hour = kph | despite = in spite of |
near = close to | regarding = with regard to = with respect to = in regard to | according to = as per | all = all of |
both = both of | best known = most famous | compared with = compared to = in comparison with = in comparison to |
different from = different than = different to | at age = at the age of = aged | by means of = via |
during = in the course of | amid = in the midst of | next to = adjacent to | instead of = rather than |
apart from = aside from = with the exception of = except for | as long as = so long as | each other = one another |
resign = step down | resigned = stepped down | die = pass away | died = passed away | altogether = in total |
half = half of = one half of = half of the | outside = outside of | inside = inside of | in that year = that year |
majority = most of = a majority of = the majority of | =over = more than = in excess of = greater than |
=under = less than = fewer than | =upto = up to = as many as = as much as |
=atleast = at least = no less than = no fewer than = not less than = a minimum of |
=atmost = at most = no more than = not more than = a maximum of | =total = a total of | =themost = the most |
=thefew = the few | =theone = the one | 1/3 = a third of = one third of | 1/4 = a quarter of = one quarter of |
because = due to the fact that | although = despite the fact that = in spite of the fact that |
various = a variety of | use = make use of | used = made use of | ended = came to an end |
additionally = in addition | however = in contrast = by contrast = on the other hand | indeed = in fact |
hence = as a result = for this reason | year old = years old | world war ii = wwii = ww2 | world war i = wwi |
square km = sq km = square kilometers | ° c = degrees celsius | ° f = degrees fahrenheit | start of = beginning of |
near = in close proximity to | =too = as well | health care = healthcare | ceo = chief executive officer |
cfo = chief financial officer | vice president = vp | cellphone = cell phone = mobile phone |
year over year = year on year |
have no = do not have any = do not have a = do not have an = has no = does not have any = does not have a |
had no = did not have any = did not have a = did not have an
"""
# What they mean before a number. What means a place or a span of time besides is read so only before a large amount.
BEFORE_NUMBERS: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(_split("about around approximately roughly some circa approx"), "=about"),
        **dict.fromkeys(_split("just merely"), "only"),
    }
)
BEFORE_AMOUNTS: Mapping[str, str] = MappingProxyType(
    {**dict.fromkeys(_split("over above"), "=over"), **dict.fromkeys(_split("under below"), "=under")}
)
SPANS = _split("minutes hours days weeks months years decades centuries games matches rounds seasons")
MOVES: Mapping[str, str] = MappingProxyType({"up": "rise.past", "down": "fall.past"})  # behind "was"
RELATIVES = _split("which that who whom")
# What may come or go, but for a relative behind a comma: it says how sentences hang together, or is grammar.
LIGHT = RELATIVES | _split("a an the also =total additionally furthermore moreover besides")
# Likewise, but only where they open a sentence or stand between commas.
LINKS = _split("and but however then meanwhile hence nevertheless nonetheless so moreover accordingly yet indeed")
CLOSERS = _split("too =too")  # likewise, at the end of what a comma or the sentence ends
DETERMINERS = _split("the a an his her its their our my this these those")
LATE_LINKS = _split("however then meanwhile hence")  # which may stand behind the first word, too
AUXILIARIES = _split("is are was were be been being has have had do does did will can may must would could")
NO_ADVERBS = _split("only family italy july reply supply ally rally fly assembly monopoly")  # in -ly
MOVING_ADVERBS = _split("often sometimes now still also already soon")
MONTHS = _split("january february march april may june july august september october november december")
WEEKDAYS = _split("monday tuesday wednesday thursday friday saturday sunday")
DAYS = MONTHS | WEEKDAYS
OPENERS = DAYS | _split(
    "in on at during after before since until by from between under for with without despite when while if because "
    "unlike throughout within through as according_to because_of among along_with following upon although near over "
    "alongside given like once where"
)
# Where a clause holds one of these, what stood before it may belong to a part of it alone.
_JOINTS = _split(
    "and or that which who whom whose because when while if after before since until although though unless whether "
    "where once as to "
    # verbs that a clause may follow
    "said says say told tells announced announces reported reports claimed claims added adds believed believes thought "
    "thinks denied denies admitted admits confirmed confirms argued argues suggested suggests hoped hopes feared fears "
    "knew knows known warned warns insisted insists noted notes explained explains promised promises concluded "
    "concludes found finds learned learns expected expects predicted predicts revealed reveals showed shows shown "
    "demonstrated demonstrates estimated estimates wrote writes saw sees heard hears felt feels considered considers "
    "decided decides agreed agrees declared declares stated states remembered remembers recalled recalls informed "
    "proposed proposes doubted doubts"
)
SAYING = _split("said says")


def _read(table: str) -> Iterator[list[str]]:
    return (line.split() for line in table.split("|"))


def _inflect(verb: str, irregular: Mapping[str, list[str]]) -> Iterator[tuple[str, str]]:
    """Yield the forms of a verb and what each is: its base, past or present participle."""
    yield verb, "base"
    stem = verb.removesuffix("e")
    if verb.endswith("y") and verb[-2] not in "aeou":
        third, past = verb[:-1] + "ies", verb[:-1] + "ied"
    else:
        third, past = verb + ("es" if verb.endswith(("s", "x", "sh", "ch")) else "s"), stem + "ed"
    yield third, "base"
    own = irregular.get(verb, [])
    for form in own:
        yield form, "ing" if form.endswith("ing") else "past"
    if not any(not form.endswith("ing") for form in own):
        yield past, "past"
    if not any(form.endswith("ing") for form in own):
        yield stem + "ing", "ing"


def _collect_words() -> dict[str, str]:
    irregular = {first: rest for first, *rest in _read(_IRREGULAR)}
    found: dict[str, str] = {}
    for verbs in _read(_VERBS):
        for verb in verbs:
            for form, kind in _inflect(verb, irregular):
                found[form] = f"{verbs[0]}.{kind}"
    for words in (*_read(_WORDS), *_read(_SPELLINGS)):
        found.update(dict.fromkeys(words, found.get(words[0], words[0])))
    return found


def _collect_phrases() -> dict[str, list[tuple[tuple[str, ...], tuple[str, ...]]]]:
    found: dict[str, list[tuple[tuple[str, ...], tuple[str, ...]]]] = {}
    for line in _PHRASES.split("|"):
        meaning, *others = (tuple(text.split()) for text in line.split(" = "))
        key = meaning if len(meaning) == 1 else ("_".join(meaning),)
        for words in (meaning, *others):
            if words != key:
                found.setdefault(words[0], []).append((words, key))
    for phrases in found.values():
        phrases.sort(key=lambda phrase: -len(phrase[0]))
    return found


def find_participle(word: str) -> str | None:
    """Return the present participle of a verb in the third person or the past, or None if it may be none."""
    if word in _PARTICIPLES:
        return _PARTICIPLES[word]
    stem, _, form = word.rpartition(".")
    if stem:
        return f"{stem}.ing" if form in ("base", "past") else None
    for ending in ("ies", "ied"):
        if word.endswith(ending):
            return word.removesuffix(ending) + "ying"
    for ending, least in (("ed", 5), ("es", 5), ("s", 4)):
        if word.endswith(ending) and len(word) >= least and not word.endswith(("ss", "us", "is")):
            return word.removesuffix(ending).removesuffix("e") + "ing"
    return None


WORDS: Mapping[str, str] = MappingProxyType(_collect_words())  # a word -> what it means
# by first word: phrases, longest first, each with what it means
PHRASES: Mapping[str, list[tuple[tuple[str, ...], tuple[str, ...]]]] = MappingProxyType(_collect_phrases())
JOINTS = _JOINTS | {WORDS.get(word, word) for word in _JOINTS}
