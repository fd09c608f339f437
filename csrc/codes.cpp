#include "codes.h"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <utility>

namespace prosparse {
namespace {

constexpr uint32_t kTop = 1u << 24;  // below it, a range takes in another byte
constexpr int kRate = 6;             // a probability or an average moves by 1/64 of what it is off
constexpr int kUnary = 15;           // sizes of up to that many have a decision each, larger ones bits
constexpr int kDecided = 6;          // after so many, decisions share a probability
constexpr int kCap = 7;              // larger codes count as 7 in averages
constexpr int kClasses = 20;

// The probability, of 2^16, that a decision is no.
struct Chance {
    uint16_t no = 1 << 15;

    void learn(bool yes) {
        if (yes)
            no -= no >> kRate;
        else
            no += (65535 - no) >> kRate;
    }
};

// Range coding (Martin 1979) of binary decisions. A Coder takes the upper part of the interval or not, as it
// is told or as it reads, and shifts a byte out or in.
template <class Coder>
class Interval {
  public:
    bool decide(Chance& chance, bool told) {
        const uint32_t part = (range_ >> 16) * chance.no;
        const bool yes = coder().take(part, told);
        chance.learn(yes);
        keep(yes ? range_ - part : part);
        return yes;
    }

    bool flip(bool told) {
        const uint32_t half = range_ >> 1;
        const bool yes = coder().take(half, told);
        keep(half);
        return yes;
    }

  private:
    Coder& coder() { return static_cast<Coder&>(*this); }

    void keep(uint32_t range) {
        for (range_ = range; range_ < kTop; range_ <<= 8) coder().shift();
    }

    uint32_t range_ = ~0u;
};

class Writer : public Interval<Writer> {
  public:
    static constexpr bool reads = false;

    bool take(uint32_t part, bool told) {
        if (told) low_ += part;
        return told;
    }

    // With the carry of LZMA: a byte is held back, and those of ones after it, until none can reach them.
    void shift() {
        if (low_ < 0xff000000u || low_ >> 32) {
            const uint8_t carry = uint8_t(low_ >> 32);
            if (started_) bytes_.push_back(uint8_t(held_ + carry));
            for (; ones_; ones_--) bytes_.push_back(uint8_t(0xff + carry));
            held_ = uint8_t(low_ >> 24);
            started_ = true;
        } else {
            ones_++;
        }
        low_ = uint32_t(low_) << 8;
    }

    std::vector<uint8_t> finish() {
        for (int i = 0; i < 5; i++) shift();
        return std::move(bytes_);
    }

  private:
    std::vector<uint8_t> bytes_;
    uint64_t low_ = 0;
    uint8_t held_ = 0;
    bool started_ = false;
    size_t ones_ = 0;
};

class Reader : public Interval<Reader> {
  public:
    static constexpr bool reads = true;

    Reader(const uint8_t* bytes, size_t n) : at_(bytes), end_(bytes + n) {
        for (int i = 0; i < 4; i++) shift();
    }

    bool take(uint32_t part, bool) {
        const bool yes = code_ >= part;
        if (yes) code_ -= part;
        return yes;
    }

    void shift() {
        missing_ |= at_ == end_;
        code_ = code_ << 8 | (at_ == end_ ? 0 : *at_++);
    }

    bool ended() const { return at_ == end_ && !missing_; }

  private:
    const uint8_t *at_, *end_;
    uint32_t code_ = 0;
    bool missing_ = false;
};

// Of an average in 1/4096: 0 below 1/128, then two classes for each power of two.
int class_of(int average) {
    const unsigned x = unsigned(average) >> 5;
    if (x < 2) return int(x);
    const int bits = std::bit_width(x);
    return std::min(kClasses - 1, 2 * bits - 2 + int(x >> (bits - 2) & 1));
}

// A code of `size` above kUnary: the bits of what it is above it, after as many no less one as there are
// (Elias 1975, gamma). 0 if there are more than 15.
template <class Coder>
int large(Coder& coder, int size) {
    const int rest = size - kUnary;
    int bits = 1;
    while (coder.flip(!Coder::reads && rest >> bits)) {
        if (++bits > 15) return 0;
    }
    int value = 1;
    for (int i = bits - 2; i >= 0; i--)
        value = value << 1 | int(coder.flip(!Coder::reads && (rest >> i & 1)));
    return kUnary + value;
}

// Both ways in one place: a Writer is told what a Reader finds. False if a code is too large.
template <class Coder, class Codes>
bool run(Coder& coder, size_t rows, size_t cols, Codes* codes) {
    Chance zero[2 * kClasses], more[2 * kClasses][kDecided];
    std::vector<int> columns(cols, 1 << 11);
    int row = 1 << 11;
    for (size_t r = 0; r < rows; r++) {
        for (size_t c = 0; c < cols; c++, codes++) {
            const int kind = class_of(row) + class_of(columns[c]);
            const int told = Coder::reads ? 0 : *codes, told_size = std::abs(told);
            int size = 0;
            if (coder.decide(zero[kind], told != 0)) {
                const bool negative = coder.flip(told < 0);
                size = 1;
                while (size <= kUnary &&
                       coder.decide(more[kind][std::min(size, kDecided) - 1], told_size > size))
                    size++;
                if (size > kUnary) size = large(coder, told_size);
                if (!size || size > 32767) return false;
                if constexpr (Coder::reads) *codes = int16_t(negative ? -size : size);
            } else if constexpr (Coder::reads) {
                *codes = 0;
            }
            const int counted = std::min(size, kCap) << 12;
            row += (counted - row) >> kRate;
            columns[c] += (counted - columns[c]) >> kRate;
        }
    }
    return true;
}

}  // namespace

std::vector<uint8_t> encode_codes(const int16_t* codes, size_t rows, size_t cols) {
    Writer writer;
    run(writer, rows, cols, codes);
    return writer.finish();
}

bool decode_codes(const uint8_t* bytes, size_t n, size_t rows, size_t cols, int16_t* codes) {
    Reader reader(bytes, n);
    return run(reader, rows, cols, codes) && reader.ended();
}

}  // namespace prosparse
