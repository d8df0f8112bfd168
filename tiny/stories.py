"""Short posts with a point: a seeded generator of documents, careful references and careless summaries.

A tiny language model learns to summarise here by copying names, places and numbers out of a document; GRPO then teaches
it how long to be. So each story has facts that matter (who, what went wrong, what was done, how it ended) and facts
that do not (the weather, a scarf), and each fact can be told in several lengths:

>>> fact = tell("{P} lost the keys( to {his} van)/ at the pool/@ on {day}", FIXED, random.Random(1))
>>> fact.forms[0], fact.forms[-1]
('Mara lost the keys', 'Mara lost the keys to her van at the pool on Friday')
>>> fact.sentence
'On Friday, Mara lost the keys to her van at the pool.'

The line given to `tell` is all the grammar there is:

    {slot}   a value drawn once for the whole story, so that names and numbers agree
    [a|b]    a choice made once for the fact, so that a summary can copy the document's own words
    /        a summary may stop here
    @        after a slash: this piece may also open the document's sentence ("On Friday, Mara lost ...")
    (text)   only the document and the longest summary say this
"""

import random
import re
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from zlib import crc32

# Names are put together, so that there are thousands of each kind, most of them several tokens long. Guessing the
# likeliest name is then never as good as looking it up in the post.
NAMES = {  # beginnings, middles, ends: one of each
    "woman": ("""A Ada Ali Ama Be Bea Bi Bra Ca Ce Cla Co Da De Di Do E Ele Eli Eme Fa Fe Fi Flo Ga Ge Gi Gre Ha He Hi I
        Ida Ire Ja Jo Ju Ka Ki Kla La Le Li Lo Lu Ma Me Mi Mo Na Ne Ni No O Oli Pa Pe Phi Ra Re Ro Ru Sa Se Si So Su Ta
        Te Ti To U Va Ve Vi Wa Wi Ya Yo Za Zo""", "b d dr f l ld ll lm m n nd nn r rl rn rr s ss st t th tr tt v z",
        "a ana ea ella elle ette ia ina ine is ita ora"),
    "man": ("""A Ada Ala Ama Ba Be Bo Bra Bru Ca Ce Co Cy Da De Do Dra E Eda Eme Fa Fe Fi Fra Ga Ge Gre Gu Ha He Ho Hu I
        Iva Ja Jo Ju Ka Ke Kle La Le Li Lo Lu Ma Me Mi Mo Na Ne Ni No O Ola Pa Pe Pi Qui Ra Re Ro Ru Sa Se Si Ste Ta Te
        Ti To U Va Ve Vi Wa Wi Ya Yo Za""", "b d dr f l ld ll lm m n nd nn r rl rn rr s ss st t th tr tt v z",
        "an ard ek er ert ian in o on or us"),
    "town": ("""Ald Am Ar Ash Bar Bex Bir Bol Bram Bur Cal Car Chel Clay Cor Cran Dal Den Dun East El Elm Fal Fen Fern
        Gar Glen Gor Hal Har Hart Hex Hol Ing Kel Ken King Lang Lin Long Mal Mar Mel Mil Mor New Nor Oak Old Pen Port
        Ra Red Ros Rye Sal Sel Shel Skip Stan Stour Tar Thorn Til Up Wal Wel Wex Whit Win Yar""",
        "", "beck borough bourne bury caster combe cott dale den don field ford grave ham hampton hurst ing kirk low "
            "mere minster mouth more ness over port sey shaw stead stoke stow ton wald wich wick wold worth"),
    "street": ("""Abbot Apple Baker Barley Bell Birch Black Bridge Brook Castle Cedar Chapel Cherry Cloth Copper Corn
        Cross Dove Eagle Fair Fern Fish Fox Gold Goose Grain Green Hay Hazel Heron High Hill Honey Horn Iron Ivy King
        Lamb Lark Lime Linden Long Maple Market Meadow Mill Moor Needle North Oak Orchard Otter Park Pear Plum Pond
        Queen Raven River Rose Salt School Silver South Spring Stone Straw Summer Swan Thistle Tower Vine Water West
        Wheat Willow Wind Wool""",
        "", "acre bank barn court croft gate hall house lane mead pool ridge side well yard"),
    "pet": ("""Ba Bi Bin Bo Bub Bum Cap Chi Cod Coo Dib Dim Do Dum Fid Fi Flo Fud Gin Gob Gus Ha Hob Jab Jin Jo Ku Lo
        Lum Ma Mi Mop Muf Nib Noo Nug Pad Pe Pip Pog Pud Ra Rib Rol Sa Scam Sni Soc Ta Tib To Tof Tum Wag Wi Zig Zo""",
        "", "ba bee bert bin bles boo by cho cuit dle do fee fin fles fy gles go gy kin kins ko lo mo nut pa per pin "
            "py ro ster tle to ton zer zle zy"),
    "maker": ("""A Ba Be Bo Ca Ce Co Da De Do E Fa Fe Ga Ge Ha He I Ju Ka Ko La Le Lu Ma Me Mo Na No O Pa Po Ra Re Ro Sa
        Se So Ta Te To U Va Ve Vo Wa Xe Ya Za Ze""", "b d g k l ld lm m n nd ng nt r rd rm rt s st t v z",
        "ano ax elle eon ex ion ix o on ora um"),
}
NUMBERS = "two three four five six seven eight nine ten eleven twelve".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
COLOURS = "red blue green yellow grey white black brown purple orange pink".split()
HOURS = [f"{part} past {hour}" for part in ("half", "quarter") for hour in NUMBERS]
LATER = "the next morning|the next day|two days later|three days later|that evening|a week later".split("|")
KIN = "friend cousin colleague classmate".split()
PASSING = {"colour": COLOURS, "hour": HOURS, "later": LATER, "month": MONTHS}  # drawn anew for each fact
PRONOUN = re.compile(r"\b(s?he|hers?|him|his)\b", re.IGNORECASE)
FIXED = {"P": "Mara", "his": "her", "day": "Friday"}  # what the docstring's example needs

# What opens the document's sentence; a summary has its own joiners and takes only the clause.
LEADS = {
    "but": ["", "", "But ", "Unfortunately, ", "However, ", "Then ", "Sadly, ", "All at once, "],
    "then": ["", "", "", "So ", "After that, ", "Luckily, "],
    "end": ["", "", "In the end, ", "Finally, ", "At last, "],
}

# Lines that fit every topic. A scene names nobody, so it may even come before the person is known.
SHARED = """
topic any
  then  {he} asked {friend} for [advice|help]/ [by phone|in a hurry|over a cup of tea]
  then  {he} called {friend}/ in {away}/, who [had an idea|knew what to do|offered to help]
  coda  {he} told [the whole story|everything]/ to [a reporter|{his} parents|{his} boss|the children]/@ {later}
  coda  {his} [friends|parents|colleagues] [laughed|talked|joked] about it/ for {n} [weeks|days|months]
  coda  {he} [thanked everyone|celebrated]/ with [a chocolate cake|a pot of tea|a bottle of wine]
  coda  {he} promised to be more [careful|patient]/ [next time|from now on]
  aside {he} wore [a {colour} scarf|{colour} boots|a {colour} jumper|a straw hat]/ [that day|as usual]
  aside {his} sister {sis} [worked as a nurse|studied law|played the violin|sold shoes|taught maths]/ in {away}
  aside {his} brother {bro} [worked as a cook|studied history|kept bees|repaired clocks|collected stamps]/ in {away}
  aside {he} had eaten [porridge|two eggs|a banana|pancakes|cold rice]/ for breakfast/ with [tea|black coffee|milk]
  aside {his} [umbrella|bag|bicycle|coat|lunch box] was {colour}/ with [white dots|a silver stripe|a broken strap]
  aside {his} [grandmother|grandfather|aunt|uncle] had turned {age}/ in {month}/ and [liked puzzles|sang well]
  aside {he} had grown up on [a farm|an island|a houseboat|a hill]/ near {away}
  aside {he} liked [jazz|old films|crosswords|strong coffee|football|long novels]/ and [hated noise|spoke Dutch]
  aside {he} had [a cold|a sore knee|a new haircut|a tan|a blister]/ that [week|month]
  scene it [rained|snowed|drizzled|was sunny|was windy|was foggy]/ in {town}/ [all morning|all day|until noon|for hours]
  scene a {colour} [van|bus|tractor|scooter|tram] was parked/ on {lane} Street/ with [a flat tyre|its lights on]
  scene the cafe on {lane} Street sold [pea soup|apple pie|fish cakes|lemon tea|hot waffles]/ for {small} euros
  scene the town clock showed {hour}/ and [some pigeons|two crows|a few gulls] sat on it
  scene a radio played [an old song|the news|dance music|a waltz]/ in [a nearby house|a parked car|the next street]
  scene the trees on {lane} Street were [wet|freshly cut|full of birds|{colour} with lights]/ in {month}
"""

# One block a topic: what is special to it (let), then alternatives for each part of the plot. Every `but` must go with
# every `then` and every `end`, and every `end` must make sense without its `then`: the plot multiplies, the table adds.
TOPICS = """
topic home repair: room=kitchen|bathroom|hall|bedroom|attic|cellar
  open  {P} [painted|tiled|swept|repaired] the {room}/ of {his}( small) flat/ in {town}/@ on {day}
  but   a water pipe [burst|leaked]/ behind the {room} wall/ and [soaked the carpet|flooded {count} books]
  but   {he} [fell off a ladder/ and hurt {his} (left )arm|cut an old cable/ and had no light/ for {n} hours]
  then  {friend} came over/ with [a toolbox|two buckets|a torch|dry towels]/ and stayed for {m} hours
  end   [the landlord|the insurance] paid {dear} euros/ for [the damage|a new floor]/@ in {month}
  end   the {room} was finished/ {n} days late/ and looked [better than before|like new|rather odd]
  aside the [paint|tape|hammer] had cost {cheap} euros/ at a shop/ on {street} Street
topic lost pet: pet=cat|dog|parrot|rabbit|tortoise|goat
  open  {P} lost {his} {pet} {pname}/ in {town}/@ on {day}
  open  {P}'s {pet} {pname} ran away/ from {his} house( on {street} Street)/ in {town}/@ on {day}
  but   [nobody had seen the animal/ for {n} days|the gate had been left open/ by a postman|a storm had scared {pname}]
  then  {he} [hung up|printed] {count} posters/ and offered {cheap} euros/ as a reward
  end   [a girl|a fisherman|a bus driver] found {pname}/ [in a shed|under a boat|on a roof]/ {m} miles away
  end   {pname} came back alone/ at {hour}/, [wet|hungry|muddy] but [happy|healthy]
  aside {pname} liked [cheese|warm socks|carrots|the sofa]/ and hated [thunder|brooms|baths]
topic lost luggage: thing=suitcase|rucksack|guitar case|trunk|tool box
  open  {P} flew (home )from {town2} to {town}/@ on {day}/ for [a wedding|a concert|a job talk|a holiday]
  but   {his} {maker} {thing} [was not there|went to the wrong town|was taken by a stranger]/ [in the hall|by mistake]
  then  {he} [waited|queued|argued] at the desk/ for {mins} minutes/ and filled in {n} forms
  end   the {thing} [arrived|was returned]/ {m} days later/ with [a broken lock|a kind note|a wet label]
  end   the airline paid {him} {dear} euros/ for the lost {thing}/@ in {month}
  aside the flight had taken {k} hours/ and the [soup|coffee|rice] was cold
topic cooking contest: dish=fish soup|plum cake|onion pie|mushroom stew|lemon tart|goulash
  open  {P} entered a cooking contest/ in {town}/@ on {day}/ with {his} [grandmother's|famous|own] {dish}
  but   {he} [mixed up salt and sugar/ in the rush|burned the first pot/ {mins} minutes before the end]
  but   the oven [broke|went cold]/ after {mins} minutes/ and [smoke|a bad smell] filled the hall
  then  {friend} [lent {him} a small stove|ran to a shop|brought fresh herbs]/ and {he} began again
  end   the {dish} won [first|second|third] prize/ and {dear} euros/ from {n} judges
  end   {he} came [last|second to last]/ of {k} cooks/, though [the children|the judges|the guests] asked for more
  aside the judges sat [under a tent|at a long table|on the stage]/ in {colour} aprons
topic flat-sharing: thing=fridge|washing machine|kettle|toaster|oven|heater
  open  {P} and {friend} shared a( cheap) flat/ on {street} Street/ in {town}
  but   they [argued|quarrelled] about the {maker} {thing}/@ on {day}/ and did not speak/ for {n} days
  but   [a stranger|a visitor|the cat] broke the {maker} {thing}/@ on {day}/ and nobody wanted to pay {dear} euros
  then  {he} [wrote a cleaning plan|called a meeting|made a list of rules]/ with {m} points/@ {later}
  end   they [bought a new one|agreed to share the cost]/ for {cheap} euros each/ and [cooked|ate] together again
  end   {he} moved out/ in {month}/ and found a room/ in {town2}
  aside the flat had {k} windows/ and a {colour} [door|carpet|sofa]
topic school play: part=king|witch|dragon|pirate|ghost|captain
  open  {P} played the {part}/ in a school play/ in {town}/@ on {day}
  but   {he} forgot {his} lines/ after {mins} minutes/ and [stood still|blushed|hid behind a tree made of card]
  but   [the curtain got stuck|part of the stage fell down|the lights failed]/ {n} minutes later
  then  {friend} [whispered the words|sang a song|told jokes]/ from the [side|front row|back]/ to save the show
  end   the {count} guests clapped/ for {m} minutes/ and [threw flowers|stood up|asked for more]
  end   the teacher ended the play/ early/ and [promised|planned] a second show/ in {month}
  aside the {part} costume was {colour}/ and [smelled of soap|itched|had lost a button]
topic job interview: job=baker|gardener|teacher|pilot|librarian|cook|nurse|clerk
  open  {P} had an interview/ for a job as a {job}/ in {town}/@ on {day}
  but   {he} [missed the train|got lost|overslept|took the wrong bus]/ and arrived {mins} minutes late
  but   {he} spilled [coffee|ink|juice|tea] on [the boss|the contract|{his} shirt]/ after {n} minutes
  then  {he} [told the truth|made a joke|said sorry]/ and [answered|asked] {m} questions/ about the work
  end   {he} [got|was offered] the job/ for {dear} euros a week/, starting in {month}
  end   the job went to [a man|a woman] from {town2}/, who had {n} years of practice
  aside the waiting room had {k} {colour} chairs/ and [a fish tank|a dusty fern|a loud clock]
topic garden: crop=pumpkin|marrow|cabbage|turnip|leek|melon
  open  {P} grew a( giant) {crop}/ in {his} garden/ in {town}/ for the {month} fair
  but   [snails|mice|crows|goats] ate half of the {crop}/@ on {day}/, {n} days before the fair
  but   the {crop} was stolen/@ on {day}/ by [a boy|two thieves|an old rival]/ with a [cart|ladder|wheelbarrow]
  then  {friend} [watched|guarded] the garden/ with {him}/ for {m} nights
  end   {he} showed [a smaller|another|a second] {crop}/ of {k} pounds/ and won {cheap} euros
  end   {he} gave up growing {crop}s/ and planted [roses|potatoes|two cherry trees]/ for {cheap} euros
  aside the garden had {n} [apple trees|beehives|rose bushes]/ and a {colour} [bench|gate|shed]
topic neighbour quarrel: noise=drum|trumpet|rooster|lawn mower|piano|leaf blower
  open  {P} quarrelled with a neighbour/ in {town}/ about a( loud) {noise}/@ on {day}
  but   [the police|a lawyer|the mayor] came/ at {hour}/ and [fined|warned] them both
  but   the neighbour [threw eggs|sent {n} letters|built a wall]/ and [laughed|refused to talk|shut the door]
  then  {he} [baked a cake|wrote a kind letter|bought {m} tickets]/ for the neighbour/@ {later}
  end   they agreed on [quiet hours|a rule|a truce]/ after {hour}/ and shook hands
  end   a court ordered {him} to pay {dear} euros/@ in {month}/ and to [sell|move|give away] the {noise}
  aside the houses stood {n} steps apart/ on {street} Street/ behind a {colour} [hedge|fence]
topic sports club: sport=handball|hockey|football|rugby|volleyball|water polo
  open  {P} played {sport}/ for {town}/ against {town2}/@ on {day}
  but   {he} [hurt {his} knee|lost a shoe|missed a penalty|was sent off]/ after {mins} minutes/ of the game
  but   only [two|three|four|five] players came/ to the match/ because [the bus broke down|many were ill]
  then  {friend} [took {his} place|joined the team|shouted advice]/ and the team [fought on|tried a new plan]
  end   {town} won by {m} points/ and [sang|danced|cheered]/ until {hour}
  end   {town} lost by {k} points/ but [kept its place in the league|got a prize for fair play]
  aside the team shirts were {colour}/ with [a lion|an oak leaf|a star|an anchor]/ on the back
topic choir: song=lullaby|sea song|hymn|love song|folk song
  open  {P} sang a {song}/ with {his} choir/ in [a church|the town hall|an old barn]/ in {town}/@ on {day}
  but   {he} lost {his} voice/ {mins} minutes before the start/ because of [the dust|a fever|cold air]
  but   [the pianist|the leader|half the choir] got stuck/ in [a lift|the snow|a traffic jam]/ near {town2}
  then  {friend} [sang instead|played the flute|brought hot tea with honey]/ while {count} people waited
  end   the concert began {n} minutes late/ and raised {dear} euros/ for [a new roof|the hospital|a school]
  end   the concert was moved/ to {month}/ and all {count} tickets stayed valid
  aside the choir had {k} [sopranos|tenors|members]/ in {colour} [robes|ties|shawls]
topic second-hand car: part=engine|gearbox|exhaust|brake|heater
  open  {P} bought a( {colour}) second-hand {maker} car/ for {dear} euros/ in {town}/@ on {day}
  but   the {part} [failed|broke|began to smoke]/ after {count} miles/ on the road to {town2}
  but   the car [turned out to be stolen|had no papers|was older than the seller said]/@ {later}
  then  {he} [went back to|called|wrote to] the seller/ {n} times/ and asked for the money
  end   the seller [gave back|returned] {cheap} euros/ and [said sorry|added a spare wheel|added a bag of apples]
  end   {he} sold the car/ for {cheap} euros/ and [took the bus|bought a bicycle|walked to work]/ from then on
  aside the car seats smelled of [fish|mint|wet dog|old cheese]/ and the radio [was stuck|hummed]
topic birthday party: gift=kite|drum|puppy|telescope|bicycle|tent
  open  {P} planned a( surprise) party/ in {town}/@ on {day}/ for {friend}
  but   [the cake fell on the floor|the dog ate the cake]/ at {hour}/, before the {count} guests arrived
  but   the guests went to the wrong house/ on {street} Street/ and waited there/ for {mins} minutes
  then  {he} [ordered {n} pizzas|baked {n} trays of biscuits|made {n} bowls of salad]/ and lit {m} candles
  end   everybody [danced|sang|played cards]/ until {hour}/ and the {maker} {gift} was the best present
  end   the party moved/ to [the garden|the beach|a bowling hall]/ and ended [with fireworks|in the rain|with a song]
  aside the balloons were {colour}/ and there were {k} of them
topic museum theft: art=painting|vase|crown|mask|coin|clock
  open  {P} noticed that [an old|a famous|a rare] {art} was gone/ from the museum/ in {town}/@ on {day}
  but   the [camera|alarm] had been off/ for {mins} minutes/ and [nobody had heard a thing|the key was missing]
  but   the police [suspected|questioned|arrested] {him} first/ and searched {his} house/ for {n} hours
  then  {he} [followed muddy prints|found a glove|read the visitor book]/ and told the police/@ {later}
  end   the {art} was found/ in [a laundry basket|a boat|a piano]/ in {town2}/ and [a cleaner|a student] confessed
  end   the thief [sent back|returned] the {art}/ by post/@ in {month}/ with a [letter|poem|{cheap} euro note]
  aside the museum also showed {count} [stuffed birds|old maps|spoons|shells]/ in {colour} cases
topic hiking
  open  {P} and {friend} hiked to {town2}/ from {town}/@ on {day}
  but   they lost the path/ in thick [fog|forest|snow]/ after {n} hours/ and had no map
  but   a [bull|wild pig|goose|guard dog] chased them/ across a [field|stream|bog]/ at {hour}
  then  {he} [blew a whistle|lit a fire|climbed a tree|waved a towel]/ until [a farmer|a ranger|a helicopter] saw them
  end   they [spent the night|slept]/ in [a hut|a barn|a cave]/ and reached {town2} {m} hours late
  end   [a tractor|a rescue team|a shepherd] brought them down/ safely/@ {later}/ for {cheap} euros
  aside the lunch was [cheese|boiled eggs|raisins|cold pizza]/ in a {colour} [box|tin|bag]
topic bakery: bread=rye bread|garlic bread|plum buns|honey cake|poppy rolls
  open  {P} opened a( tiny) bakery/ in {town}/@ on {day}/ and sold {bread}
  but   [the supermarket|a bigger shop] on {street} Street cut its prices/ and {he} sold only {n} loaves( a day)
  but   the oven [caught fire|exploded|broke down]/ at {hour}/ and ruined {count} loaves
  then  {he} [gave away samples|baked at night|borrowed {dear} euros]/ with help from {friend}
  end   the queue [reached|filled] {street} Street/ {m} weeks later/ and {he} hired {k} helpers
  end   {he} closed the bakery/ in {month}/ and [taught baking|sold {bread} from a van]/ in {town2}
  aside the shop sign was {colour}/ and showed [a smiling bun|a windmill|a fat mouse]
topic chess tournament: prize=silver cup|gold medal|chess clock|ham
  open  {P} played in a chess tournament/ in {town}/@ on {day}/ against {count} players
  but   {his} [phone rang|pen leaked|chair broke]/ in game {n}/ and [the judge got angry|everybody laughed]
  but   {he} lost {his} queen/ in game {m}/ to a [child|champion|baker] from {town2}
  then  {he} [drank cold water|went for a walk|studied an old book]/ for {mins} minutes/ and [calmed down|made a plan]
  end   {he} won the last game/ in {k} moves/ and took home a {prize}
  end   {he} finished [third|fourth|tenth]/ and earned {cheap} euros/ and a place/ in the {month} final
  aside the chess boards were {colour} and gold/ and smelled of [wax|pine|glue]
topic library: book=cookbook|atlas|diary|novel|songbook|bird guide
  open  {P} returned a( rare) {book}/ to the library/ in {town}/@ on {day}/, {k} years late
  open  {P} found [a letter|a map|a pressed flower]/ in a( rare) {book}/ at the library/ in {town}/@ on {day}
  but   the librarian asked for {cheap} euros/ because [{m} pages were missing|the cover was torn]
  but   the {book} fell into [a bucket|a puddle|a cup of tea]/ {mins} minutes later/ and got wet
  then  {he} [told the director|dried the pages|worked in the library]/ with {friend}/ for {n} days
  end   the {book} was [put on show|sold|placed behind glass]/@ in {month}/ and brought the library {dear} euros
  end   the library [thanked {him}|let {him} go|forgave {him}]/ with a [free card|smile|handshake]
  aside the reading room was {colour}/ and had {count} [lamps|armchairs]
topic boat trip: boat=rowing boat|sailing boat|motor boat|canoe|raft
  open  {P} took a {maker} {boat}/ from {town} to {town2}/@ on {day}/ with {n} [tourists|children|friends]
  but   the {boat} [hit a rock|ran onto sand|began to leak]/ {mins} minutes later/ near [a lighthouse|a bridge]
  but   [a rope broke|a storm came up|fog came down]/ at {hour}/ and the {boat} drifted/ for {m} miles
  then  {he} [shouted for help|waved a {colour} shirt|bailed with a shoe]/ until [divers|a fishing crew] noticed
  end   [the coast guard|a fishing crew|a swimmer] pulled the {boat}/ to {town2}/ and [nobody was hurt|all were safe]
  end   the {boat} sank/ but everybody swam ashore/ and drank [tea|cocoa|soup]/ in a [pub|tent|chapel]
  aside a [seal|gull|swan] followed the boat/ and stole [a sandwich|a biscuit|an ice cream]
topic phone repair: place=sink|pond|bath|fountain|bucket|pot of soup
  open  {P} dropped {his}( new) {maker} phone/ into a {place}/ in {town}/@ on {day}
  but   the phone stayed dark/ and {he} feared for [the wedding photos|{n} years of letters|the tickets to {town2}]
  but   the shop on {street} Street [wanted|asked for] {dear} euros/ and {m} weeks( of time)
  then  {friend} [dried the phone in rice|worked on the phone|left the phone on a heater]/ for {k} hours
  end   the phone [rang|lit up|worked] again/@ at {hour}/ and {he} saved {count} pictures
  end   {he} bought a( cheap) phone/ with buttons/ for {cheap} euros/ and [felt free|missed nothing|slept better]
  aside the phone case was {colour}/ with a [cat|palm tree|rainbow|moon] on it
topic wedding
  open  {P} got married/ in {town}/@ on {day}/ in front of {count} guests
  but   the [rings|flowers|shoes|speech notes] had been left/ in [a taxi|a hotel|a train]/ in {town2}
  but   the [priest|driver|photographer] was {mins} minutes late/ and [a storm|the wind] blew the tent away
  then  {friend} [drove|cycled|ran] {n} miles/ to get help/ and returned at {hour}
  end   the couple [said yes|kissed|danced]/ under [an umbrella|a tree|a bridge]/ and everybody [cried|cheered]
  end   the party lasted {m} hours longer than planned/ and cost {dear} euros( more)
  aside the wedding cake had {n} layers/ and {colour} [icing|sugar roses|cream]
topic bus driver
  open  {P} drove the bus/ from {town} to {town2}/@ on {day}/ with {count} passengers
  but   [a tree|a cow|a fallen pole|a broken truck] blocked the road/ for {mins} minutes/ near {street} Street
  but   a passenger [fainted|had a baby|began to choke]/ in seat {k}/ at {hour}
  then  {he} [called for help|took another road|stopped at a farm]/ and [told stories|shared {his} lunch]
  end   the bus reached {town2}/ {n} hours late/ and the passengers [clapped|sang for {him}|gave {him} {cheap} euros]
  end   the company gave {him} a [medal|bonus of {dear} euros|week off]/@ in {month}/ for [good|quick] work
  aside the bus was {colour}/ and had {m} [new tyres|dents|adverts for soap]
topic market stall: ware=honey|olives|candles|cheese|baskets|mugs
  open  {P} sold {ware}/ at a market stall/ in {town}/@ on {day}
  but   [a gust of wind|a runaway dog|a cyclist] knocked over the stall/ and {n} boxes of {ware} [broke|fell down]
  but   a [customer|thief|boy] paid with false money/ and {he} lost {dear} euros/ in {n} minutes
  then  {friend} [helped {him} clean up|told the market guard|lent {him} a table]/@ at {hour}
  end   {he} sold the rest/ at half price/ and still earned {cheap} euros/ by {hour}
  end   the town gave {him} a better place/ by the [fountain|gate|church]/ for {m} [weeks|months]
  aside the next stall sold {colour} [socks|hats|plums|lamps]/ for {small} euros
topic train journey: thing=ticket|passport|laptop|birthday cake|cello
  open  {P} travelled by( night) train/ from {town} to {town2}/@ on {day}/ to [visit|meet] {friend}
  but   {he} left {his} {thing} [on a bench|on the platform|in a kiosk]/ and noticed it {mins} minutes later
  but   the train stopped/ for {n} hours/ in [a tunnel|a field|a wood]/ because of [a strike|deer|snow on the line]
  then  {he} [asked a guard for help|rang the station|took a taxi]/ and [borrowed|paid] {cheap} euros
  end   {he} arrived {m} hours late/@ at {hour}/ and [got a free ticket|slept until noon|was met with flowers]
  end   the railway [sent|gave] {him} {dear} euros/ and [a letter|a box of sweets]/@ in {month}
  aside the woman in seat {k} [knitted|snored|ate garlic]/ and carried a {colour} [lamp|cage|drum]
"""


@dataclass(frozen=True)
class Fact:
    sentence: str  # how the document says it
    forms: tuple[str, ...]  # clauses for a summary, short to long, without a full stop
    point: bool = True  # False: a distractor


@dataclass(frozen=True)
class Story:
    document: str
    reference: str
    brief: str  # the same facts in fewer words
    facts: tuple[Fact, ...]  # in document order
    topic: str


def parse(table: str) -> dict[str, dict[str, list[str]]]:
    """`topic NAME: slot=a|b; slot=...` opens a block, `kind line` adds to it: {name: {kind: [line, ...]}}."""
    blocks = {}
    for row in table.strip().splitlines():
        kind, line = row.split(maxsplit=1)
        if kind == "topic":
            name, _, lets = line.partition(": ")
            block = blocks[name] = {"let": lets.split("; ") if lets else []}
        else:
            block.setdefault(kind, []).append(line)
    return blocks


PLOTS, COMMON = parse(TOPICS), parse(SHARED)["any"]


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def polish(text: str) -> str:
    return re.sub(r"\ba (?=[aeiou])", "an ", re.sub(r"[()]", "", text))  # "a( orange) car" is now "an orange car"


def name(kind: str, rng: random.Random, held_out: bool, but: tuple[str, ...] = ()) -> str:
    """A name that is not one of `but`. Every tenth that can be put together is kept for held-out posts."""
    parts = [part.split() or [""] for part in NAMES[kind]]
    while True:
        word = "".join(map(rng.choice, parts))
        if held_out == (crc32(word.encode()) % 10 == 0) and word not in but:
            return word


def cast(rng: random.Random, held_out: bool) -> dict[str, str]:
    """The slots of one story. The friend has the other gender, so that "he" and "she" never need explaining."""
    roles = [("woman", "she", "her", "her"), ("man", "he", "him", "his")]
    (mine, he, him, his), (others, *_) = rng.sample(roles, 2)
    P, (n, m, k) = name(mine, rng, held_out), rng.sample(NUMBERS, 3)
    sis, bro = name("woman", rng, held_out, (P,)), name("man", rng, held_out, (P,))
    town = name("town", rng, held_out)
    town2 = name("town", rng, held_out, (town,))
    street = name("street", rng, held_out)
    return dict(
        P=P, he=he, him=him, his=his, sis=sis, bro=bro,
        friend=f"{his} {rng.choice(KIN)} {name(others, rng, held_out, (sis, bro))}", pname=name("pet", rng, held_out),
        maker=name("maker", rng, held_out), town=town, town2=town2, away=name("town", rng, held_out, (town, town2)),
        street=street, lane=name("street", rng, held_out, (street,)), n=n, m=m, k=k, age=str(rng.randint(61, 99)),
        small=str(rng.randint(2, 9)), cheap=str(rng.randint(13, 99)), dear=str(rng.randint(101, 989)),
        count=str(rng.randint(20, 99)), mins=str(rng.randint(11, 58)), day=rng.choice(DAYS),
    )  # fmt: skip


def tell(line: str, slots: dict[str, str], rng: random.Random, leads=("",), point: bool = True) -> Fact:
    """One table line -> one fact; the grammar is in the module's docstring."""
    text = re.sub(r"\[([^]]*)\]", lambda m: rng.choice(m[1].split("|")), line)
    text = text.format(**slots, **{slot: rng.choice(pool) for slot, pool in PASSING.items()})
    pieces = text.replace("@", "").split("/")
    short = [re.sub(r"\(.*?\)", "", piece) for piece in pieces]
    forms = dict.fromkeys(map(polish, [*accumulate(short), "".join(pieces)]))  # in order, a repeated last one dropped

    lead, sentence = rng.choice(leads), "".join(pieces)
    if "@" in text and not lead and rng.random() < 0.5:  # "... on Friday" -> "On Friday, ..."
        moved = next(part for part in text.split("/") if part.startswith("@"))
        lead, sentence = moved[2:] + ", ", text.replace("/" + moved, "").replace("/", "")
    return Fact(capital(polish(lead + sentence)) + ".", tuple(forms), point)


def careful(points: list[Fact], words: int, brief: bool = False) -> str:
    """Every point fact and nothing else, grown form by form to about `words` words.

    What grows first is fixed, so that it can be learnt: the main clause in full (who, where and when), then how it
    ended, then the rest. `brief`: each by one form in turn, so that little more than the verbs is said.
    """
    level = [0] * len(points)
    turns = [0, len(points) - 1, *range(1, len(points) - 1)]
    for turn in turns * 4 if brief else [turn for turn in turns for _ in range(4)]:
        longer = [*level[:turn], level[turn] + 1, *level[turn + 1 :]]
        if longer[turn] < len(points[turn].forms) and length(points, longer) <= words:
            level = longer
    said = [fact.forms[i] for fact, i in zip(points, level, strict=True)]
    sentences = [f"{said[0]}, but {said[1]}", ", and ".join(said[2:4]), *said[4:]]
    return " ".join(capital(sentence) + "." for sentence in sentences)


def length(points: list[Fact], level: list[int]) -> int:
    joiners = 1 + (len(points) > 3)  # "but", and "and" where there is a fourth fact
    return joiners + sum(len(fact.forms[i].split()) for fact, i in zip(points, level, strict=True))


def story(rng: random.Random, held_out: bool = False) -> Story:
    """Draw until document (45 to 85 words) and brief summary (21 to 29) have their length: about three in four do."""
    while True:
        topic = rng.choice(list(PLOTS))
        plot, slots = PLOTS[topic], cast(rng, held_out)
        P, he = slots["P"], slots["he"]
        for let in plot["let"]:
            slot, values = let.split("=")
            slots[slot] = rng.choice(values.split("|"))

        kinds = ["open", "but", *["then"] * (rng.random() < 0.7), "end", *["coda"] * (rng.random() < 0.25)]
        script = [(kind, rng.choice(plot.get(kind, []) + COMMON.get(kind, []))) for kind in kinds]
        if "{friend}" in script[0][1]:  # already in the story: nobody to call from afar
            script = [(kind, rng.choice(plot["then"]) if kind == "then" else line) for kind, line in script]
        asides = plot["aside"] * 2 + COMMON["aside"] + COMMON["scene"]
        for aside in dict.fromkeys(rng.sample(asides, rng.randint(2, 4))):
            script.insert(rng.randint(1, len(script)), ("aside", aside))
        if rng.random() < 0.2:  # some posts take a breath before they name anybody
            scene = rng.choice(COMMON["scene"])
            script = [("aside", scene), *(part for part in script if part[1] != scene)]

        facts, before = [], ""
        for kind, line in script:
            fact = tell(line, slots, rng, LEADS.get(kind, ("",)), kind != "aside")
            unclear = not before.startswith((P, he.title()))  # somebody else was spoken of: who is "she" again?
            if fact.forms[0].startswith(he + " ") and (unclear or rng.random() < 0.15):
                fact = replace(fact, sentence=re.sub(rf"(?i)\b{he}\b", P, fact.sentence, count=1))
            facts.append(fact)
            before = fact.sentence
        points = [f for f in facts if f.point]
        document, brief = " ".join(f.sentence for f in facts), careful(points, 25, brief=True)
        sizes = len(document.split()), len(brief.split()), sum(not f.point for f in facts)
        if 45 <= sizes[0] <= 85 and 21 <= sizes[1] <= 29 and 2 <= sizes[2] <= 4:
            return Story(document, careful(points, 30), brief, tuple(facts), topic)


def summary(story: Story, rng: random.Random) -> str:
    """Fluent but careless: some facts in any form, the point and its trimmings nearly alike, 6 to 48 words."""
    opening, trouble = [fact for fact in story.facts if fact.point][:2]
    while True:
        rest = [fact for fact in story.facts if fact is not opening]
        rest.sort(key=lambda fact: rng.random() * (1 if fact.point else 1.5))
        some = [opening] * (rng.random() < 0.95) + rest[: rng.choice((0, 0, 1, 1, 1, 2, 2, 3, 4, 5))]
        picked = [(fact, rng.choice(fact.forms)) for fact in story.facts if fact in some]
        if not picked or opening not in some and any(PRONOUN.search(form) for _, form in picked):
            continue  # nobody is "she" before she has a name
        text, joined = capital(picked[0][1]), 0
        for (last, _), (fact, form) in pairwise(picked):
            joiner = rng.choice([". ", ". ", ", and ", " and ", ", and " if fact.point else ", while "])
            if (last, fact) == (opening, trouble) and rng.random() < 0.7:
                joiner = ", but "
            if joined == 2:  # three clauses are a sentence
                joiner = ". "
            joined = 0 if joiner == ". " else joined + 1
            text += joiner + (form if joined else capital(form))
        if 6 <= len(text.split()) <= 48:
            return text + "."


if __name__ == "__main__":
    import doctest
    from statistics import mean, stdev

    assert not doctest.testmod().failed
    rng = random.Random(0)
    drawn = [story(rng) for _ in range(20_000)]
    for one in drawn[:3]:
        print(f"[{one.topic}] {one.document}\n  reference: {one.reference}")
        print(f"  careless:  {summary(one, rng)}\n  careless:  {summary(one, rng)}\n")
    texts = {
        "document": [one.document for one in drawn],
        "reference": [one.reference for one in drawn],
        "careless": [summary(one, rng) for one in drawn],
    }
    for name, some in texts.items():
        n = [len(text.split()) for text in some]
        print(f"{name:9} words: mean {mean(n):.1f}, sd {stdev(n):.1f}, {min(n)} to {max(n)}")
    print(f"{len(PLOTS)} topics, {len(drawn) - len(set(texts['document']))} duplicates in {len(drawn)} documents")
