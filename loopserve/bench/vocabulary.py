"""List the words of the recall dialogues: places that have codes, words that codes are made of, and small talk.

The three groups share no word, so a word alone determines its group.
"""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PLACES: tuple[str, ...] = _words(
    """
    aachen aarhus aberdeen abidjan abuja accra adana adelaide agadir agra ajaccio albany aleppo algiers alicante
    almaty amiens amman amsterdam anchorage ancona andorra angers ankara annecy antalya antwerp apia arequipa
    arezzo arles arnhem ashgabat asmara astana asuncion athens atlanta auckland augsburg austin avignon avila
    baghdad baku baltimore bamako bandung bangalore bangkok banjul barcelona bari basel basra bath bayonne
    beijing beirut belem belfast belgrade belmopan benin bergamo bergen berlin bern biarritz bilbao billings
    birmingham bishkek bissau bogota boise bologna bolzano bonn bordeaux boston brasilia bratislava bremen
    brescia brest brighton brisbane bristol brno bruges brussels bucharest budapest bujumbura burgos bursa busan
    cadiz caen cagliari cairo calais calgary cali cambridge canberra cancun cannes cantabria caracas cardiff
    carthage casablanca catania cayenne chennai chicago cleveland cologne colombo conakry copenhagen cordoba
    cork corinth coventry cremona curitiba cusco dakar dallas damascus danang darwin davos debrecen delft delhi
    denver derby detroit dhaka dijon djibouti dodoma doha dortmund dresden dubai dublin dubrovnik duisburg
    dundee dunedin durban dushanbe edinburgh edmonton eindhoven erfurt espoo essen exeter faro ferrara fez
    flensburg florence fortaleza frankfurt freetown freiburg fresno fukuoka funchal gaborone galway gdansk
    gdynia geneva genoa georgetown ghent gibraltar girona giza glasgow goma gothenburg granada graz grenoble
    groningen guadalajara guatemala haarlem haifa halifax hamburg hamilton hannover hanoi harare havana
    heidelberg helsinki hiroshima hobart honiara honolulu houston huelva hull innsbruck ipswich isfahan
    islamabad istanbul izmir jaipur jakarta jena jerez juba juneau kabul kampala kano kansas karachi kassel
    katowice kaunas kazan khartoum kiel kigali kingston kinshasa klagenfurt kobe kolkata kosice krakow kyiv
    kyoto lagos lahore lancaster lausanne leeds leicester leiden leipzig leon leuven lhasa libreville liege
    lilongwe lima limerick limoges lincoln linz lisbon liverpool ljubljana lodz lome london louisville luanda
    lublin lucca lucerne lugano lusaka luxembourg lviv lyon maastricht madrid madurai mainz malabo malaga male
    malmo managua manama manaus manchester mandalay manila mannheim maputo marrakesh marseille maseru matera
    mecca medellin medina melbourne memphis mendoza merida messina metz miami milan minsk modena mogadishu
    mombasa monaco monrovia monterrey montevideo montpellier montreal moroni moscow mosul mumbai munich murcia
    muscat nagasaki nagoya nairobi namur nancy nantes naples narvik nashville nassau niamey nicosia nice nimes
    nottingham nuremberg oakland odense odessa omaha oporto orlando orleans osaka oslo ottawa oulu oviedo oxford
    padua palermo palma panama paris parma pavia perpignan perth perugia pescara philadelphia phoenix piacenza
    pisa pittsburgh plovdiv plymouth podgorica poitiers porto potsdam poznan prague pretoria pristina quebec
    quito rabat raleigh ravenna reims rennes reno reykjavik riga rimini riyadh rome rostock rotterdam rouen
    salamanca salerno salzburg samara samarkand santiago santos sapporo sarajevo seattle segovia seoul seville
    sheffield siena singapore skopje sofia sousse sparta split stavanger stockholm strasbourg stuttgart sucre
    surabaya suva swansea sydney szeged tabriz taipei tallinn tampa tampere tangier tarragona tartu tashkent
    tbilisi tehran tijuana tirana tokyo toledo toronto toulon toulouse tours trento treviso trieste tripoli
    tromso trondheim tucson tunis turin turku utrecht vaduz valencia valletta vancouver varna venice verona
    vicenza vienna vigo vilnius warsaw wellington windhoek winnipeg worcester wroclaw wuhan yaounde yerevan york
    zagreb zaragoza zurich
    """
)
"""Names of places, one word each; a fact gives a place its code."""

CODE_WORDS: tuple[str, ...] = _words(
    """
    acorn agate alder almond amber anchor anvil apple apricot arch arrow ash aspen aster azure badger bamboo
    banjo barley barn basil basin basket beacon beaver beech beetle bell berry birch bison blossom bobcat bonnet
    boulder branch brass brick bridge bronze brook bucket buffalo butter button cabin cactus camel candle canoe
    canyon carbon cardinal carpet castle cedar cello chalk cherry chestnut cinder cinnamon citron clay cliff
    cloud clover cobalt cobra comet compass copper coral cotton coyote crane crater cricket crimson crow crown
    crystal cypress daisy delta desert diamond dingo dolphin dove dragon drum dune dust eagle ebony echo elbow
    elder elk elm ember emerald engine falcon feather fern ferret fiddle fig finch flame flint flute forest
    fossil fox frost garnet gazelle geyser ginger glacier glass globe goose gorge granite grape gravel grove
    gull hammer harbor harp hawk hazel heather hedge helmet heron hill hollow honey horizon hornet ibis indigo
    iris iron island ivory ivy jackal jade jaguar jasmine jasper jungle juniper kayak kettle kite koala lagoon
    lamp lantern larch lark laurel lava lavender leaf ledge lemon leopard lilac lily lime linen lion lizard
    lobster lotus lynx magnet magpie mango mantle maple marble marigold marsh meadow melon mercury meteor mint
    mirror mole moose mosaic moss mountain mustard myrtle nebula needle nest nickel oak oasis ocean ochre olive
    onyx opal orange orbit orchard orchid osprey otter owl oyster paddle palm panda panther pearl pebble pelican
    pepper petal pigeon pillar pine planet plum pond poplar poppy prairie prism puffin pumpkin purple python
    quail quartz quill rabbit raccoon radish rainbow raven reed reef ribbon ridge river robin rocket rose ruby
    saddle saffron sage salmon sand sandal sapphire satin scarlet seal shadow shell shield silk silver slate
    snow sparrow spider spruce squirrel star stone stork storm sulfur summit swallow swan tiger timber topaz
    torch tower trout tulip tundra tunnel turtle umber valley velvet violet viper walnut walrus waterfall wave
    weasel whale wheat willow wolf wren yarrow zebra zinc
    """
)
"""Words that codes are made of; they occur nowhere else."""

PEOPLE: tuple[str, ...] = _words("anna ben clara david emma felix greta henry ida jonas lena max nora oscar paula tom")
FOODS: tuple[str, ...] = _words("soup rice pasta bread cake salad fish cheese toast pizza")
DAYS: tuple[str, ...] = _words("monday tuesday wednesday thursday friday saturday sunday")
TIMES: tuple[str, ...] = _words("today yesterday tonight tomorrow again lately")
PLACES_NEARBY: tuple[str, ...] = _words("park office market station library garden kitchen museum theatre beach")
THINGS: tuple[str, ...] = _words("book film song game letter picture story concert bike phone")
FEELINGS: tuple[str, ...] = _words("happy tired busy calm late early glad hungry sleepy ready")
WEATHER: tuple[str, ...] = _words("sunny rainy windy cold warm foggy cloudy hot")

SLOTS: dict[str, tuple[str, ...]] = {
    "{person}": PEOPLE,
    "{food}": FOODS,
    "{day}": DAYS,
    "{time}": TIMES,
    "{place_nearby}": PLACES_NEARBY,
    "{thing}": THINGS,
    "{feeling}": FEELINGS,
    "{weather}": WEATHER,
}
"""Words for each slot of a small-talk sentence."""

SMALL_TALK: tuple[str, ...] = (
    "we had {food} for lunch {time} .",
    "i had {food} with {person} on {day} .",
    "{person} made some {food} for all of us .",
    "it was very {weather} on {day} .",
    "it may be {weather} and {weather} on {day} .",
    "the weather has been {weather} all week .",
    "i hope that it will be {weather} on {day} .",
    "{person} and {person} went to the {place_nearby} on {day} .",
    "we met {person} near the {place_nearby} {time} .",
    "i saw {person} at the {place_nearby} and we talked for an hour .",
    "the {place_nearby} was closed on {day} so we went home .",
    "there were many people at the {place_nearby} {time} .",
    "{person} is reading a new {thing} about the old {place_nearby} .",
    "that {thing} was much better than i thought .",
    "{person} told me a funny {thing} about the {place_nearby} .",
    "i am still looking for my {thing} .",
    "did you know that {person} likes {food} ?",
    "my sister bought a new {thing} on {day} .",
    "i feel a bit {feeling} {time} .",
    "{person} was {feeling} and went to bed .",
    "we were all {feeling} after the long walk .",
    "thank you for your help {time} .",
    "that sounds good to me .",
    "let us talk about it on {day} .",
    "i will call {person} {time} .",
    "the bus was late again this morning .",
    "my brother plays music with {person} every {day} .",
    "please give me a minute , i am {feeling} .",
    "well , {person} never eats {food} .",
    "hello , how are you {time} ?",
    "good morning , i slept well .",
    "by the way , {person} says hello .",
    "next week we will visit the {place_nearby} with {person} .",
    "the children played in the {place_nearby} until dinner .",
    "i forgot my {thing} at the {place_nearby} .",
    "can we go to the {place_nearby} on {day} ?",
    "{person} wants to learn how to cook {food} .",
    "some of my friends are {feeling} and some are not .",
    "there is nothing better than {food} when it is {weather} .",
    "this {thing} is for you .",
)
"""Sentences of small talk; a slot in braces is filled with a random word of its group."""

GRAMMAR: tuple[str, ...] = _words(". , ? the code codes of is are what and kept in ok")
"""Words that facts, questions and answers are built with."""


def vocabulary() -> tuple[str, ...]:
    """Return every word that a dialogue can hold, each once, in a fixed order."""
    talk = [word for sentence in SMALL_TALK for word in sentence.split() if word not in SLOTS]
    groups = [GRAMMAR, PLACES, CODE_WORDS, *SLOTS.values(), talk]
    return tuple(dict.fromkeys(word for group in groups for word in group))
