#!/usr/bin/env python3
"""Submit articles to the news example, one every few seconds.

The articles are put together from word lists, or with --ollama MODEL written by a language
model that a local Ollama server runs. Needs nothing but Python's standard library.
"""

import argparse
import http.client
import json
import os
import random
import signal
import socket
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import deque

WAIT_SECONDS = 30  # for a server that is still starting
ANSWER_SECONDS = 10  # for the server to answer a submission
MODEL_SECONDS = 120  # for a model to write an article; the first one loads the model, too

# Lengths the server accepts, for what a model writes.
HEADLINE_LENGTH = 200
SUMMARY_LENGTH = 2000

SOURCES = {
    "World": ["Meridian Press", "The Harbour Post", "Continental Wire"],
    "Business": ["Ledger Daily", "Market Square", "Continental Wire"],
    "Science": ["The Petri Review", "Orbit Weekly", "Meridian Press"],
    "Technology": ["Stack & Circuit", "Orbit Weekly", "Ledger Daily"],
    "Culture": ["The Gallery Column", "Evening Lantern"],
    "Sport": ["Final Whistle", "Evening Lantern"],
    "Climate": ["Tidewatch", "The Harbour Post", "The Petri Review"],
}

# The words that any category may use.
COMMON = {
    "city": [
        "Lisbon", "Nairobi", "Osaka", "Valparaíso", "Tallinn", "Rotterdam", "Accra", "Montréal",
        "Gdańsk", "Jakarta", "Porto Alegre", "Trieste", "Bergen", "Adelaide", "Izmir", "Leipzig",
    ],
    "year": ["2009", "2012", "2014", "2017", "2019"],
    "few": ["three", "four", "five", "six", "seven"],
    "percent": ["4", "7", "9", "12", "15", "18", "23", "31"],
    "season": ["spring", "summer", "autumn", "winter"],
    "soon": ["on Friday", "before the weekend", "next month", "within weeks", "next week"],
}  # fmt: skip

# Each category's stories, a headline and the summaries that go with it, and its own words.
DESKS = {
    "World": {
        "stories": [
            ("{city} and {city2} agree to {pact}", [
                "The first steps are due {soon}. Opponents called the timetable optimistic.",
                "The agreement ends {few} months of talks and takes effect {soon}.",
            ]),
            ("Talks in {city} end with a plan to {pact}", [
                "Delegates from {few} countries signed at dawn. Parliaments vote on it {soon}.",
                "A draft had leaked {few} days ago; the final text is half as long.",
            ]),
            ("Voters in {city} back {measure} by a narrow margin", [
                "Turnout was the highest since {year}, officials said outside the town hall.",
                "The losing side asked for a recount, which begins {soon}.",
            ]),
            ("{city} council approves {measure} after {few} hours of debate", [
                "Work begins {soon}. Residents will be asked for their view again in a year.",
                "The mayor needed the votes of the opposition, and thanked each by name.",
            ]),
            ("Ferry strike in {city} called off at the last minute", [
                "Both sides accepted a pay rise of {percent} per cent, spread over {few} years.",
                "The first boats leave {soon}. Tickets bought for the lost days remain valid.",
            ]),
        ],
        "pact": [
            "share a night train", "open a joint visa office", "clear a backlog of cargo",
            "restore the coastal road", "pool their fire brigades", "simplify border checks",
        ],
        "measure": [
            "a car-free centre", "free school meals", "a second tram line", "a cap on rents",
            "a new flood wall", "longer library hours",
        ],
    },
    "Business": {
        "stories": [
            ("{firm} to open a {plant} in {city}", [
                "The site is to employ {percent}0 people. The first are hired {soon}.",
                "{city} won against {few} other bidders; the land had been empty since {year}.",
            ]),
            ("{firm} raises its forecast as orders grow {percent} per cent", [
                "Analysts had expected less. The company reports its full figures {soon}.",
                "It is the best {season} quarter since {year}, driven by sales abroad.",
            ]),
            ("Shares in {firm} slip after a late delivery", [
                "They lost {percent} per cent before noon and won half of it back by the close.",
                "The goods are expected {soon}. A customer in {city} has asked for a discount.",
            ]),
            ("Staff at {firm} win a four-day week", [
                "A trial of {few} months had cost nothing, both sides agreed afterwards.",
                "The new hours begin {soon}, first in the offices in {city}.",
            ]),
            ("{goods} prices fall to their lowest level since {year}", [
                "A mild {season} and full warehouses left traders with more than they could sell.",
                "Buyers in {city} expect them to recover by {percent} per cent within a year.",
            ]),
        ],
        "firm": [
            "Norhaven Foods", "Castell Shipping", "Brightwater Bank", "Ostra Textiles",
            "Lindmark Motors", "Dovecote Cement", "Ternway Airlines", "Hobbin Tools",
        ],
        "plant": ["bicycle factory", "battery plant", "cold store", "design studio", "repair yard"],
        "goods": ["Coffee", "Timber", "Copper", "Cocoa", "Olive oil", "Wheat"],
    },
    "Science": {
        "stories": [
            ("{group} find {discovery} in {place}", [
                "The measurements were repeated {few} times before the team believed them.",
                "A second expedition sets out {soon}, with better instruments and warmer coats.",
            ]),
            ("Moss that glows turns up in {place}", [
                "The paper leaves one question open: why nobody had looked there since {year}.",
                "It shines for {few} hours after dusk. What it gains by that is not known.",
            ]),
            ("New telescope near {city} sees first light", [
                "The first picture took {few} nights, two of them lost to clouds.",
                "Regular observations begin {soon}; schools can book an hour each week.",
            ]),
            ("{group} explain how {animal} find their way home", [
                "Independent researchers in {city} called the evidence careful and the idea odd.",
                "They followed {percent}0 animals with tags lighter than a grain of rice.",
            ]),
            ("Old samples from {place} rewrite the history of {animal}", [
                "They had lain unlabelled in {city} since {year}, behind a box of lamps.",
                "The species is older than was thought by {percent} million years.",
            ]),
        ],
        "group": ["Biologists", "Field researchers", "Students from {city}", "Hobby naturalists"],
        "discovery": [
            "a mineral that bends light twice", "traces of an ancient lake", "a silent frog",
            "a moss that survives boiling", "the oldest known amber",
        ],
        "place": [
            "a Chilean salt flat", "a museum drawer", "a Baltic fjord", "a drained reservoir",
            "an abandoned tin mine", "a Faroese cave",
        ],
        "animal": ["eels", "swifts", "sea turtles", "bumblebees", "reindeer", "cuttlefish"],
    },
    "Technology": {
        "stories": [
            ("{maker} ships {device} that can be repaired with one screwdriver", [
                "Spare parts go on sale {soon}, with drawings that anyone may use.",
                "It has {few} screws and no glue. The makers promise parts for ten years.",
            ]),
            ("{city} moves its {service} to open-source software", [
                "The change saves {percent} per cent of last year's costs, a report says.",
                "The last old machine is switched off {soon}, after {few} years of preparation.",
            ]),
            ("Flaw in {part} lets printers talk to strangers", [
                "An update is ready. Administrators are advised to install it {soon}.",
                "The fault dates from {year} and was found by a pupil in {city}.",
            ]),
            ("{maker} cuts the power use of its {machines} by {percent} per cent", [
                "Most of it came from switching off what nobody had used since {year}.",
                "Owners of older models get the change as an update {soon}.",
            ]),
            ("Students in {city} build {device} from scrap", [
                "It took {few} weekends and cost less than a pair of shoes.",
                "The plans are to be published {soon}, along with a list of what went wrong.",
            ]),
        ],
        "maker": ["Quillon", "Arborine", "Helio Works", "Mikado Devices", "Fernling"],
        "device": ["a laptop", "a phone", "a weather station", "a reading tablet", "a radio"],
        "machines": ["routers", "data centres", "e-readers", "heat pumps", "door locks"],
        "service": ["ticket machines", "land registry", "school timetables", "parking meters"],
        "part": ["a font library", "an old driver", "a label format", "a time server"],
    },
    "Culture": {
        "stories": [
            ("{city} opens a museum of {subject}", [
                "Admission is free on the first Sunday of each month, and to anyone over ninety.",
                "The collection began in {year} in a kitchen. It now fills {few} rooms.",
            ]),
            ("Lost {work} by {artist} found in an attic in {city}", [
                "Experts are sure of the handwriting and less sure of the ending.",
                "It is to be shown in public {soon}, for the first time since {year}.",
            ]),
            ("{artist} returns with {new_work} about {subject}", [
                "Critics at the preview stayed for {few} rounds of applause.",
                "It is the first since {year}, and was made in {few} weeks in {city}.",
            ]),
            ("Festival in {city} sells out in {few} minutes", [
                "More tickets follow {soon}. The organisers apologised for the queue.",
                "The programme is still secret, which did not seem to matter.",
            ]),
            ("Street choir from {city} wins the {season} prize", [
                "The singers have met under a railway bridge, for the echo, since {year}.",
                "They won by {percent} points, with a song about the weather.",
            ]),
        ],
        "subject": [
            "lighthouses", "forgotten machines", "typewriters", "tea", "shadow puppets",
            "railway posters", "silence",
        ],
        "work": ["sketchbook", "string quartet", "manuscript", "radio play", "film reel"],
        "new_work": ["a novel", "a documentary", "an album", "a comic opera", "a photo essay"],
        "artist": ["Ines Calloway", "Tomas Brandvik", "Aiko Morina", "Ada Okonell", "Léa Fontval"],
    },
    "Sport": {
        "stories": [
            ("{team} come from behind to beat {team2} {score}", [
                "The winner fell in the last minute, in front of a full stand.",
                "It was the first victory over this rival since {year}.",
            ]),
            ("{athlete} breaks the {event} record in {city}", [
                "The old mark had stood since {year} and was thought to be out of reach.",
                "The next start is planned {soon}. Until then: sleep, and the dog.",
            ]),
            ("{team} sign {athlete} until the end of the season", [
                "A medical check follows {soon}. The coach spoke of patience, and smiled.",
                "The club had been looking for {few} months and found the answer next door.",
            ]),
            ("Rain in {city} stops the match of {team} at {score}", [
                "The game is played again {soon}; tickets remain valid.",
                "The pitch was under water within {few} minutes. Nobody was hurt.",
            ]),
            ("{athlete} retires after {few} titles", [
                "The last race was in {city}, where it had all begun in {year}.",
                "A farewell is planned {soon}. The shoes go to a school museum.",
            ]),
        ],
        "team": ["Harbour United", "Northside Rovers", "Almara Wanderers", "Tallinn Falcons"],
        "team2": ["Kestrel Athletic", "Trieste Mariners", "Bergen Blue", "Old Mill Rangers"],
        "score": ["2-1", "3-2", "4-3", "5-4"],
        "event": ["10,000-metre", "pole vault", "open-water", "javelin", "decathlon"],
        "athlete": ["Mara Lindal", "Jonas Okari", "Yuki Tanabe", "Sofia Reyland", "Piet Maaslo"],
    },
    "Climate": {
        "stories": [
            ("{city} plants {trees} trees along its ring road", [
                "Half of them are species that bear heat well. The city counts again in a year.",
                "Schools have adopted {percent}0 of them and water them by rota.",
            ]),
            ("Driest {season} since {year} empties the reservoirs of {city}", [
                "Water use must drop by {percent} per cent {soon}, the utility said.",
                "A village flooded long ago has come to light again, church and all.",
            ]),
            ("Offshore wind covers {share} per cent of demand on a stormy night", [
                "Grid operators had prepared for the peak and exported what was left.",
                "The old record had stood since {year}. Prices fell to almost nothing.",
            ]),
            ("{animal} return to the river at {city}", [
                "Volunteers have looked for them each {season} since {year}.",
                "The last weir was opened {few} years ago; the first young were seen at dawn.",
            ]),
            ("{city} tests {idea} to cool its streets", [
                "The first {few} blocks are ready {soon}. Sensors record the difference.",
                "In a trial the air was cooler by two degrees at head height.",
            ]),
        ],
        "trees": ["4,000", "9,500", "12,000", "20,000"],
        "share": ["62", "71", "78", "84"],
        "animal": ["Otters", "Salmon", "Storks", "Beavers"],
        "idea": ["white roofs", "mist nozzles", "clay pavements", "shade sails", "green walls"],
    },
}  # fmt: skip


class Fields(dict):
    """The words of one article: each name is drawn once, when a template first asks for it."""

    def __init__(self, desk: dict, rng: random.Random) -> None:
        super().__init__()
        self.desk = desk
        self.rng = rng

    def __missing__(self, name: str) -> str:
        if name == "city2":
            words = [city for city in COMMON["city"] if city != self["city"]]
        else:
            words = self.desk.get(name) or COMMON[name]
        # A word may itself ask for another one.
        self[name] = self.rng.choice(words).format_map(self)
        return self[name]


def generate(rng: random.Random, recent: deque[str]) -> dict[str, str]:
    """An article out of the word lists, on none of the `recent` stories; it joins them."""
    while True:
        category = rng.choice(list(DESKS))
        headline, summaries = rng.choice(DESKS[category]["stories"])
        if headline not in recent:
            break
    recent.append(headline)
    fields = Fields(DESKS[category], rng)
    return {
        "headline": headline.format_map(fields),
        "summary": rng.choice(summaries).format_map(fields),
        "source": rng.choice(SOURCES[category]),
        "category": category,
    }


class ModelError(Exception):
    """Why the model gave no article."""


def write_with_model(url: str, model: str, rng: random.Random) -> dict[str, str]:
    """An article by `model` of the Ollama server at `url`; raises ModelError."""
    # Category and place are drawn here: asked freely, a model writes on one subject only.
    category = rng.choice(list(DESKS))
    prompt = (
        f"Invent a short news article for the {category} section, set in or near "
        f"{rng.choice(COMMON['city'])}. No real persons or companies. Answer with a JSON object "
        'with two strings: "headline" (6 to 12 words, no full stop) and "summary" (two sentences).'
    )
    body = {
        "model": model,
        "prompt": prompt,
        "stream": False,
        "format": "json",
        "options": {"seed": rng.randrange(2**31), "temperature": 1.0},
    }
    try:
        answer = post(url.rstrip("/") + "/api/generate", body, MODEL_SECONDS)
        written = json.loads(answer["response"])
        headline, summary = written["headline"].strip(), str(written.get("summary") or "").strip()
    except urllib.error.HTTPError as exc:
        raise ModelError(f"Ollama answered {exc.code}: {reason_in(exc)}") from exc
    except TimeoutError as exc:
        raise ModelError(f"Ollama did not answer within {MODEL_SECONDS} s") from exc
    except urllib.error.URLError as exc:
        raise ModelError(f"no Ollama at {url} ({exc.reason}); is it running?") from exc
    except (OSError, http.client.HTTPException) as exc:
        raise ModelError(f"the connection to Ollama broke off ({exc})") from exc
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise ModelError(f"{model} did not answer with the JSON that was asked for") from exc
    if not headline:
        raise ModelError(f"{model} wrote no headline")
    return {
        "headline": headline[:HEADLINE_LENGTH],
        "summary": summary[:SUMMARY_LENGTH],
        "source": f"{model} (Ollama)"[:80],
        "category": category,
    }


# Past any proxy of the environment: both servers are most often on this machine.
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def post(url: str, body: dict, timeout: float) -> dict:
    """POST `body` as JSON and return the JSON answer; `timeout` in seconds."""
    request = urllib.request.Request(
        url,
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json", "Accept": "application/json"},
    )
    with opener.open(request, timeout=timeout) as response:
        return json.load(response)


def reason_in(error: urllib.error.HTTPError) -> str:
    """What an error answer says: its JSON "error", or the phrase of the status."""
    try:
        return json.loads(error.read())["error"]
    except (ValueError, KeyError, TypeError, OSError):
        return error.reason


def submit(url: str, article: dict[str, str]) -> dict:
    """Submit `article`; waits up to WAIT_SECONDS for a server that refuses connections."""
    deadline = time.monotonic() + WAIT_SECONDS
    waiting = False
    while True:
        try:
            return post(url, article, ANSWER_SECONDS)
        except urllib.error.URLError as exc:
            refused = isinstance(exc.reason, ConnectionRefusedError)
            if not refused or time.monotonic() > deadline:
                raise
        if not waiting:
            waiting = True
            complain(f"waiting up to {WAIT_SECONDS} s for the server at {url}")
        time.sleep(0.5)


def complain(message: str) -> None:
    print(f"submit_articles: {message}", file=sys.stderr, flush=True)


def run(options: argparse.Namespace) -> int:
    """Submit until `options.count` articles are accepted; return the exit status."""
    rng = random.Random(options.seed)
    # Well below the number of stories there are, or generate() would search for long.
    recent: deque[str] = deque(maxlen=15)
    accepted = 0
    while True:
        article = None
        if options.ollama:
            try:
                article = write_with_model(options.ollama_url, options.ollama, rng)
            except ModelError as exc:
                complain(f"{exc}; submitting a generated article this time")
        if article is None:
            article = generate(rng, recent)
        try:
            created = submit(options.url, article)
            line = f"{created['id']:>5}  {created['category']:<10}  {created['headline']}"
        except urllib.error.HTTPError as exc:
            complain(f"{options.url} answered {exc.code}: {reason_in(exc)}")
            # A server that failed may recover; one that refuses will refuse the next one, too.
            if exc.code < 500:
                return 1
        except (ValueError, KeyError, TypeError):
            complain(f"{options.url} did not answer with an article; is it the URL of submit?")
            return 1
        except (OSError, http.client.HTTPException) as exc:
            # urllib wraps some of them in a URLError, whose reason is the error itself.
            reason = getattr(exc, "reason", exc)
            if isinstance(reason, (ConnectionRefusedError, socket.gaierror)):
                complain(f"cannot reach {options.url}: {reason}. Start the server or pass --url.")
                return 1
            complain(f"the connection broke off ({reason}); going on with the next article")
        else:
            print(line, flush=True)
            accepted += 1
        if accepted == options.count:
            return 0
        time.sleep(options.interval)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--url",
        type=http_url,
        default="http://127.0.0.1:8000/news/submit/",
        help="where to submit (default: %(default)s)",
    )
    parser.add_argument(
        "--interval",
        type=seconds,
        default=3,
        metavar="SECONDS",
        help="pause between two articles (default: %(default)s)",
    )
    parser.add_argument(
        "--count", type=positive, metavar="N", help="stop after N articles (default: never)"
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", help="the same N generates the same articles"
    )
    parser.add_argument(
        "--ollama", metavar="MODEL", help="let this local Ollama model write, such as llama3.2"
    )
    parser.add_argument(
        "--ollama-url",
        type=http_url,
        default="http://127.0.0.1:11434",
        metavar="URL",
        help="where Ollama listens (default: %(default)s)",
    )
    return parser.parse_args(arguments)


def http_url(text: str) -> str:
    try:
        parts = urllib.parse.urlsplit(text)
        # Asking for the port is what makes urllib read it.
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable or not text.isascii() or not text.isprintable() or " " in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a URL such as http://127.0.0.1:8000/")
    return text


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 on")
    return value


def positive(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    # A terminal that cannot show a letter of Gdańsk gets a question mark.
    sys.stdout.reconfigure(errors="replace")
    # SIGTERM ends it the way Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return run(options)
    except KeyboardInterrupt:
        complain("stopped")
        return 0
    except BrokenPipeError:
        # Whoever read the output, `head` for one, has had enough. Python flushes it once more
        # at the end, which must not fail a second time.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
