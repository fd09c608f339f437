"""Codes of adapters, read and written as docs/formats.md says, decision by decision, slowly."""


def class_of(average):
    x = average // 32
    if x < 2:
        return x
    bits = x.bit_length()
    return min(19, 2 * bits - 2 + x // 2 ** (bits - 2) % 2)


class Decisions:
    """What both directions share: chances by their names, and averages."""

    def __init__(self):
        self.chances = {}

    def share(self, name):
        return self.chances.setdefault(name, 32768)

    def learn(self, name, yes):
        chance = self.chances[name]
        self.chances[name] = chance - chance // 64 if yes else chance + (65535 - chance) // 64


class Writer(Decisions):
    """The lower end of the interval is one long number: nothing is carried by hand."""

    def __init__(self):
        super().__init__()
        self.low, self.width, self.count = 0, 2**32 - 1, 4  # bytes of low

    def cut(self, part, rest, yes):
        if yes:
            self.low += part
        self.width = rest if yes else part
        while self.width < 2**24:
            self.width *= 256
            self.low *= 256
            self.count += 1
        return yes

    def decide(self, name, yes):
        part = self.width // 65536 * self.share(name)
        self.cut(part, self.width - part, yes)
        self.learn(name, yes)
        return yes

    def flip(self, yes):
        return self.cut(self.width // 2, self.width // 2, yes)

    def bytes(self):
        return self.low.to_bytes(self.count, "big")


class Reader(Decisions):
    def __init__(self, data):
        super().__init__()
        self.data, self.place, self.width, self.code = data, 4, 2**32 - 1, int.from_bytes(data[:4], "big")

    def cut(self, part, rest):
        yes = self.code >= part
        if yes:
            self.code -= part
        self.width = rest if yes else part
        while self.width < 2**24:
            self.width *= 256
            self.code = self.code * 256 + self.data[self.place]
            self.place += 1
        return yes

    def decide(self, name, _=False):
        part = self.width // 65536 * self.share(name)
        yes = self.cut(part, self.width - part)
        self.learn(name, yes)
        return yes

    def flip(self, _=False):
        return self.cut(self.width // 2, self.width // 2)


def walk(coder, codes, rows, columns):
    """`codes`, a list of lists, is what a writer is told and what a reader fills."""
    averages, row_average = [2048] * columns, 2048
    for row in range(rows):
        for column in range(columns):
            kind = class_of(row_average) + class_of(averages[column])
            told = codes[row][column]
            size, negative = 0, False
            if coder.decide(("zero", kind), told != 0):
                negative = coder.flip(told < 0)
                size = 1
                while size < 16 and coder.decide(("more", kind, min(size, 6)), abs(told) > size):
                    size += 1
                if size == 16:
                    rest, bits = abs(told) - 15, 1
                    while coder.flip(rest >= 2**bits):
                        bits += 1
                    value = 1
                    for bit in reversed(range(bits - 1)):
                        value = 2 * value + coder.flip(rest // 2**bit % 2 == 1)
                    size = 15 + value
            codes[row][column] = -size if negative else size
            counted = 4096 * min(size, 7)
            row_average += (counted - row_average) // 64
            averages[column] += (counted - averages[column]) // 64


def encoded(codes):
    writer = Writer()
    walk(writer, [list(map(int, row)) for row in codes], len(codes), len(codes[0]))
    return writer.bytes()


def decoded(data, rows, columns):
    reader = Reader(bytes(data))
    codes = [[0] * columns for _ in range(rows)]
    walk(reader, codes, rows, columns)
    assert reader.place == len(data)
    return codes
