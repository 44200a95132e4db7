"""The plots of the stories, first half: what a plot is, and those about helping and sharing.

Every line is one template; a plot's lines come in order, and each keeps cause before effect.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Plot:
    """One plot. roles: slot -> tags of `make_character`; things: slot -> pool of `stories`."""

    topic: str
    title: str
    roles: dict[str, str]
    lines: tuple[str, ...]
    lessons: tuple[str, ...]
    things: dict[str, str] = field(default_factory=dict)
    opening: str = ""  # how the hero is shown, in place of the usual one


HELPING = (
    Plot(
        "sharing",
        "{h} and the {x}",
        {"h": "", "f": ""},
        (
            "One {season} [morning|day|afternoon], {h} had {x.a} for [lunch|dinner|a picnic]. "
            "[It was all the food {h.he} had.|{h.he} had waited for it all day.|It smelled very good.|{h} could hardly wait to eat.]",
            "On the way, {h.he} met {f}, {f.intro_short}, who [looked thin and tired|was sitting alone by the road|had not eaten for two days|was weak with hunger].",
            '[{f} said, "Please, I am so hungry. Could you give me a little?"|"Good day," said {f}. "I have nothing to eat. May I have a bite?"|"Oh, that smells so good," said {f} in a small voice. "I have had no food since yesterday."]',
            "[At first {h} wanted to keep {x.it} all. But then {h.he} looked at {f} and felt sorry.|{h} thought for a moment. If {h.he} shared, there would be less for {h.him}.|{h} did not think about it for long. {h.he} could not eat while {f} was hungry.]",
            'So {h} gave {f} half of {x.the}. [They sat down together and ate in the sun.|"Sit with me," said {h}. "Food tastes better with a friend."|They ate side by side and talked until evening.]',
            "[The next {season}|Some weeks later|One cold night soon after|Before the year was over], {h} [was lost in a storm|fell into a ditch and hurt {h.his} leg|had no food left in the house]. [It was {f} who came to help.|Who came along the road? It was {f}!|^{h.he} called for help, and {f} heard {h.him}.]",
            '[{f} took {h} home and gave {h.him} warm food and a bed.|"You were kind to me," said {f}, "and now I can be kind to you."|{f} shared everything {f.he} had, just as {h} had done before.]',
        ),
        (
            "those who share will never be alone",
            "kindness always finds its way back",
            "a shared meal makes a friend",
            "what we give comes back to us",
        ),
        {"x": "meals"},
    ),
    Plot(
        "a lost thing",
        "The Lost {X}",
        {"h": "", "f": ""},
        (
            "More than anything, {h} loved {h.his} {x}. [It had been a gift from {h.his} grandmother.|{h.he} took {x.it} everywhere.|{h.he} looked at {x.it} every night before bed.]",
            "But one {season} [morning|evening|day], {x.the} {x.was} gone! [{h} looked {p}, but {x.they} {x.was} not there.|{h} searched the whole house and found nothing.|{h} felt like crying.]",
            '{h} went to {h.his} friend {f}, {f.intro_short}. "[I have lost my {x}|My {x} {x.is_} gone|I cannot find my {x}]," said {h}. "[Will you help me look|Can you help me|What should I do]?"',
            '"[Of course|Do not worry|Yes, I will help you]," said {f}. "[Where did you go yesterday?|Let us think. Where were you last?|Two can look better than one.]"',
            "[{h} remembered playing {q}. So they went there and looked.|So they walked back the way {h} had come, step by step.|First they looked {p}. Then they looked {q}.]",
            "[And there, {q}, {f} saw something shine in the light.|Suddenly {f} gave a shout.|They looked and looked until the sun was low.] There {x.was} {x.the}!",
            '"[Thank you|Thank you so much|Oh, thank you], {f}!" said {h}. "[I could not have found {x.it} without you.|You are a true friend.|I was too sad to look with care.]"',
            "[After that, {h} always put {x.the} away with care.|They went home together, laughing all the way.|That evening they drank tea together and {h} was happy again.]",
        ),
        (
            "it is good to ask a friend for help",
            "two pairs of eyes are better than one",
            "a friend can find what sadness cannot see",
            "nothing is lost for long when friends look together",
        ),
        {"x": "treasures", "p": "spots", "q": "spots"},
    ),
    Plot(
        "a small friend who helps a big one",
        "The {H} and the {F}",
        {"h": "small animal", "f": "big animal"},
        (
            "One day {h} ran into {f}, a big {f.noun}. [{f} was sleeping, and {h} woke {f.him} by mistake.|{h} had not looked where {h.he} was going.|{h} was in the way.]",
            '[{f} was angry. "How dare you!" said {f.he}. "You are so small that I could step on you."|"Who is there?" growled {f}. "Go away, little {h.noun}, or I will be angry."|"You are too small to be of any use," laughed {f}.]',
            '"[Please let me go|Forgive me, please|Do not be angry]," said {h}. "[One day I may help you|Perhaps I can help you some day|I am small, but I can be a good friend]."',
            "[{f} laughed so hard that the leaves shook. But {f.he} let {h} go.|{f} thought that this was very funny, and let {h} go.|{f} smiled at that and let {h} walk away.]",
            "[A few days later|Not long after that|The very next week], {f} was caught in [a hunter's net|a net of strong ropes|thick ropes between two trees]. {f.he} [pulled and pulled|roared and kicked|turned and twisted], but {f.he} could not get free.",
            "{h} heard {f} [crying|calling for help|far away] and came [at once|as fast as {h.he} could|to see what was wrong]. {h.he} began to [bite through|pull at|work at] the ropes, one after another.",
            "[It took all night, but at last|After a long time|Little by little the ropes grew thin, and then] the net [broke|fell open|came apart] and {f} was free.",
            '"[I laughed at you|I thought that you were too small to help me|I was wrong]," said {f}. "[Today you saved my life|Now I know better|You are small, but your heart is big]."',
        ),
        (
            "even the smallest friend can be a great help",
            "no one is too small to help",
            "it is foolish to laugh at those who are small",
            "a kind deed is never wasted",
        ),
    ),
    Plot(
        "working together",
        "The Heavy {B}",
        {"h": "", "f": "", "o": ""},
        (
            "One {season} [day|night], a [huge|great|heavy] {b} [rolled onto|came down on] the road [to the well|to the market|to the river]. Nobody could pass.",
            "{h} [pushed|pulled|worked] [with all {h.his} strength|as hard as {h.he} could|until {h.his} legs were shaking], but the {b} did not move.",
            'Then came {f}, {f.intro_short}. "[Let me try|I am strong, I will do it|Stand back and watch]," said {f}. {f.he} [pushed and puffed|pulled until {f.his} face was red|tried once, twice, three times]. The {b} did not move.',
            'Next came {o}, {o.intro_short}. "[It is no use|I cannot move it either|This will never work]," said {o}, after {o.he} had tried. [All three of them sat down and sighed.|They all looked at the {b} sadly.]',
            'At last {h} had an idea. "[We have each tried alone|One by one we failed]," {h.he} said. "[What if we all push at the same time?|Let us try it together!]"',
            'So {h}, {f} and {o} stood side by side. "One, two, three, push!" [The {b} shook. It moved a little.|Slowly, very slowly, the {b} began to roll.|The {b} groaned and moved.] [Then it rolled|And then it rolled] off the road and [down the hill|into the ditch|into the grass].',
            "[Everyone cheered.|The three friends danced on the open road.|From then on people could walk there again, and they thanked the three friends.]",
        ),
        (
            "together we can do what no one can do alone",
            "many hands make light work",
            "friends are strong when they work together",
            "what is too heavy for one is light for three",
        ),
        {"b": "barriers"},
    ),
    Plot(
        "a lost little one",
        "The Little Lost {F}",
        {"h": "", "f": "small animal", "o": "grown"},
        (
            "One [rainy|misty|windy] {season} evening, {h} heard a small voice {p}. [It was somebody crying.|Somebody was calling, very softly.]",
            '{h} looked and found {f}, a tiny {f.noun}, all wet and cold. "[What is wrong, little one|Why are you crying|Where is your mother]?" asked {h}.',
            '"[I followed a butterfly and now I am lost|I went too far from home|The wind was strong and I lost my way]," said {f}. "[I want to go home to my mother.|I live in a/an {f.home}, but I do not know where it is.|I do not know which way to go.]"',
            '"[Do not be afraid|Dry your eyes|I will help you]," said {h}. "[We will find your home together.|I will not leave you alone.]" And {h} [gave {f} something warm to eat|put a warm scarf around {f}|dried {f} with a soft cloth].',
            'Then they set out. First they asked {o}, {o.intro_short}. [{o} had not seen {f}\'s mother, but {o.he} pointed to the path by the river.|"I heard somebody calling near the bridge," said {o}.|{o} shook {o.his} head, but gave them a lamp for the dark road.]',
            '[They walked on until the moon came up.|They went over the bridge and past the mill.|The road was long, and {f} grew tired, so {h} sang a song.] [Then they heard|At last they heard] a voice: "{f}! {f}! Where are you?"',
            "It was {f}'s mother! [{f} ran to her and she held {f.him} tight.|She laughed and cried at the same time.|She kissed {f} again and again.]",
            '"[How can I thank you?|Thank you for bringing my child home,|You have a good heart,]" she said to {h}. [From then on, {h} was always welcome in their house.|And {h} walked home under the stars with a glad heart.|She gave {h} {x.a} to take home.]',
        ),
        (
            "a kind heart is the best lamp in the dark",
            "nobody is too busy to help a child",
            "to help somebody home is to find a friend",
            "being kind makes a long road short",
        ),
        {"x": "meals", "p": "spots"},
    ),
    Plot(
        "honesty",
        "The Purse of Gold",
        {"h": "", "f": "human"},
        (
            "{h} was poor. [{h.he} had only {x.a} in the house.|Some days {h.he} had nothing to eat.|{h.his} roof had holes, and the rain came in.]",
            'One {season} day, {h} found a purse {p}. It was full of gold coins! [Nobody was there to see.|{h} had never seen so much gold.|"I could buy anything I want," thought {h}.]',
            'But then {h} thought, ["Somebody must be very sad to have lost this."|"This gold is not mine."|"What if somebody needs this to buy bread?"] [So {h.he} went from door to door to find the owner.|So {h.he} walked to town and asked everyone there.]',
            "[At the last house|At the end of the day|In the market], {h} met {f}, {f.intro_short}, who was [looking for something on the ground|close to tears|asking everybody about a purse].",
            '"[Did you lose this|Is this yours]?" asked {h}. {f} [could hardly believe it|counted the coins, and not one was missing|jumped for joy]. "[All my savings were in it|I worked ten years for this|Anyone else would have kept it]," {f.he} said.',
            "[{f} gave {h} three gold coins as a reward.|{f} asked {h} to come and work for {f.him}, and paid {h.him} well.|{f} had {h}'s roof mended, and sent {h.him} bread every week.]",
            "[So {h} was never poor again, and {h.he} slept well every night.|{h} bought what {h.he} needed and was happy.|And the two of them became good friends.]",
        ),
        (
            "honesty is worth more than gold",
            "an honest heart sleeps well",
            "what is not ours brings no joy",
            "honest people find good friends",
        ),
        {"x": "meals", "p": "spots"},
    ),
    Plot(
        "a gift",
        "A Gift for {f}",
        {"h": "", "f": ""},
        (
            "{h} had a good friend, {f}, {f.intro_short}. [Tomorrow was {f}'s birthday|{f}'s birthday was only one day away], and {h} wanted to give {f.him} {x.a}.",
            "[{h} counted {h.his} coins. There were only two, and that was not enough.|But in the shop {x.the} cost five coins, and {h} had only one.|But {h} had no money at all.]",
            '{h} [sat down {p} and thought|walked up and down and thought|went home with slow steps]. "[What can I give, if I cannot buy anything?|If I cannot buy a gift, I can make one.|A friend should not go without a gift.]"',
            "[So {h} gathered flowers and leaves and made a crown from them.|Then {h} picked the finest berries and baked a little cake.|So {h} took wood and a knife and carved a little bird.|So {h} sat up all night and wrote a song.] [It took a long time, but {h} did it with love.|{h} worked until the candle went out.]",
            "[The next morning|On the birthday], {h} felt shy. The others had brought [big boxes with ribbons|fine things from the town]. {h.his} gift looked so small.",
            'But {f} [held it up for all to see|looked at it for a long time|had tears of joy in {f.his} eyes]. "[You made this for me|Nobody ever made something just for me]?" {f.he} said. "[This is the best gift of all.|I will keep it in my heart for ever.|I like it more than anything from a shop.]"',
        ),
        (
            "a gift made with love is the best gift",
            "love cannot be bought in a shop",
            "it is the heart that makes a gift great",
            "the best gifts cost nothing but care",
        ),
        {"x": "treasures", "p": "spots"},
    ),
    Plot(
        "a wish",
        "The Wish",
        {"h": "", "f": ""},
        (
            'One {season} night, {h} found a little [golden fish in a net|star that had fallen from the sky|silver bird in a cage of thorns]. "[Please help me|Set me free]!" it said. "[Then I will give you one wish.|If you do, you may make one wish.]"',
            '{h} [felt sorry for it and set it free|was kind and helped it at once|did so with gentle hands, and it was free]. "[Thank you|You are kind]. Now make your wish," it said, "[but think well|but you have only one]."',
            '{h} thought. ["I could wish for gold," {h.he} said, "or for {x.a}, or for a house with a hundred rooms."|First {h.he} wanted gold. Then {h.he} wanted {x.a}. Then {h.he} wanted to be king of the land.]',
            "But then {h} thought of {f}, {f.intro_short}, who lived next door. {f} had been ill [since the winter|for many weeks|for a long time], and [no medicine helped|nobody knew what to do|{f.he} could not get out of bed].",
            '"I wish for {f} to be well again," said {h}. [There was a flash of light, and then it was dark and quiet.|The air was full of sparks for a moment.] [The little thing was gone.|And then {h} was alone.]',
            "[The next morning, there was a knock at the door.|When the sun came up, {h} ran to {f}'s house.] There stood {f}, [as well as could be|laughing and strong|with red cheeks and bright eyes].",
            '"[I woke up and all the pain was gone|Something wonderful has happened|Come, let us go out and play]!" said {f}. [{h} never told anyone about the wish, but {h.he} smiled all day.|And {h} was happier than gold could have made {h.him}.|{h} said nothing, but {h.his} heart was full of joy.]',
        ),
        (
            "the best wish is a wish for somebody else",
            "a friend is worth more than gold",
            "true joy comes from helping others",
            "health and friends are the greatest treasure",
        ),
        {"x": "treasures"},
    ),
    Plot(
        "kindness to a stranger",
        "The Stranger at the Door",
        {"h": "", "f": "human grown"},
        (
            "One [cold|stormy|dark] {season} night, there was a knock at {h}'s door. Outside stood [a stranger in a wet coat|a stranger with bare feet|a tired stranger with an old bag].",
            '"[May I come in and warm myself|Please, may I sleep here tonight]?" asked the stranger. "[Every other door was closed to me.|I have walked all day and I am cold.|Nobody else would let me in.]"',
            '{h} had [only one bed and little food|not much, only {x.a} and a small fire|a very small house]. But {h.he} said, "[Come in, come in|You are welcome here|Please come in and sit by the fire]." [{h} gave the stranger {x.the} and the best place by the fire.|{h} gave the stranger {h.his} bed and slept on the floor.]',
            'In the morning the stranger [stood up and smiled|thanked {h} from the heart|threw off the old coat]. "[I am not who you think|You do not know me]. I am {f}, and I am the [king\'s own doctor|richest {f.noun} in the land|ruler of this land]. I wanted to see who has a good heart."',
            "[{f} gave {h} a new house with a big garden.|And {f} gave {h} a bag of silver and a warm coat.|From that day on, {h} was {f}'s friend and guest.] [The neighbours were sorry that they had kept their doors shut.|When the neighbours heard of it, they were ashamed.|Now all the neighbours wished that they had opened their doors.]",
        ),
        (
            "a good heart opens the door to everyone",
            "you never know who stands at your door",
            "kindness should not ask for a name",
            "a little kindness can bring great luck",
        ),
        {"x": "meals"},
        "{h.intro} [lived alone|lived] in a/an {h.home}.",
    ),
    Plot(
        "a bridge",
        "The Bridge",
        {"h": "", "f": "", "o": ""},
        (
            "{h} lived on one side of a [wide|deep|fast] river, and {f}, {f.intro_short}, lived on the other. [They waved to each other every day, but they could not cross.|The two were friends, but they could only shout across the water.]",
            'One {season} day {h} said, "[Let us build a bridge|I will build a bridge]!" {o}, {o.intro_short}, laughed at that. "[A bridge? You will never finish it|It is too hard for you|The water will take it away]," said {o}.',
            "But {h} [did not listen|only smiled|set to work]. Every day {h.he} [carried stones to the water|brought wood from the forest|put one stone upon another]. And {f} [did the same on the other side|worked on {f.his} side, too].",
            "[Once, a flood took half of it away. They began again.|When it rained, they worked in the rain.|Sometimes they were tired, but they did not stop.] [A week went by, and then a month.|The days grew short and long again.]",
            "[At last the two sides met in the middle.|Then came the day when {h} laid the last stone.] {h} and {f} [shook hands high above the water|danced on their new bridge|sat in the middle and shared {x.a}].",
            'Soon everyone used the bridge. Even {o} came. "[I was wrong to laugh|I am sorry that I laughed]," {o.he} said. "[It is a fine bridge.|You did what nobody else could.]"',
        ),
        (
            "great things are built one stone at a time",
            "those who keep going will reach the other side",
            "friendship can build a bridge over any river",
            "it is easy to laugh and hard to build",
        ),
        {"x": "meals"},
    ),
)
