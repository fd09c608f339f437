#include "pack.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace prosparse {
namespace {

size_t block_bytes(Type t) {
    switch (t) {
        case Type::q8_0: return 34;
        case Type::q5_1: return 24;
        case Type::q4_0: return 18;
        case Type::q4_1: return 20;
        default: return 0;
    }
}

struct Block {
    uint16_t scale = 0, min = 0;  // f16 bits
    uint8_t codes[32] = {};
};

Block decode_block(Type t, const uint8_t* src) {
    Block b;
    std::memcpy(&b.scale, src, 2);
    const uint8_t* p = src + 2;
    if (has_min(t)) {
        std::memcpy(&b.min, p, 2);
        p += 2;
    }
    if (t == Type::q8_0) {
        for (int k = 0; k < 32; k++) b.codes[k] = uint8_t(p[k] ^ 0x80);  // int8 -> code + 128
        return b;
    }
    uint32_t high = 0;
    if (t == Type::q5_1) {
        std::memcpy(&high, p, 4);
        p += 4;
    }
    for (int k = 0; k < 16; k++) {
        b.codes[k] = uint8_t((p[k] & 15) | (high >> k & 1) << 4);
        b.codes[k + 16] = uint8_t(p[k] >> 4 | (high >> (k + 16) & 1) << 4);
    }
    return b;
}

// Unsigned codes, padded to whole chunks of 64, into the row layout.
void pack_codes(Type t, const uint8_t* codes, int cols, uint8_t* dst) {
    const int chunks = round_up(cols, 64) / 64;
    if (t == Type::q8_0) {
        std::memcpy(dst, codes, size_t(chunks) * 64);
        return;
    }
    for (int c = 0; c < chunks; c++) {
        const uint8_t* v = codes + c * 64;
        for (int k = 0; k < 32; k++) dst[c * 32 + k] = uint8_t((v[k] & 15) | (v[k + 32] & 15) << 4);
        if (t == Type::q5_1) {
            uint64_t high = 0;
            for (int k = 0; k < 64; k++) high |= uint64_t(v[k] >> 4 & 1) << k;
            std::memcpy(dst + chunks * 32 + c * 8, &high, 8);
        }
    }
}

// The reverse, for one chunk of a row of `chunks`.
void unpack_chunk(Type t, const uint8_t* src, int chunks, int chunk, uint8_t codes[64]) {
    if (t == Type::q8_0) {
        std::memcpy(codes, src + chunk * 64, 64);
        return;
    }
    uint64_t high = 0;
    if (t == Type::q5_1) std::memcpy(&high, src + chunks * 32 + chunk * 8, 8);
    for (int k = 0; k < 32; k++) {
        codes[k] = uint8_t((src[chunk * 32 + k] & 15) | (high >> k & 1) << 4);
        codes[k + 32] = uint8_t(src[chunk * 32 + k] >> 4 | (high >> (k + 32) & 1) << 4);
    }
}

size_t float_bytes(Type t) { return t == Type::f32 ? 4 : 2; }

}  // namespace

size_t file_row_bytes(Type type, int cols) {
    return quantized(type) ? size_t(cols) / 32 * block_bytes(type) : size_t(cols) * float_bytes(type);
}

void pack_row(Type type, const uint8_t* src, int cols, uint8_t* dst) {
    if (!quantized(type)) {
        const size_t n = size_t(cols) * float_bytes(type);
        std::memcpy(dst, src, n);
        std::memset(dst + n, 0, row_bytes(type, cols) - n);
        return;
    }
    const int blocks = scale_blocks(cols);
    thread_local std::vector<uint8_t> codes;
    codes.assign(size_t(blocks) * 32, 0);
    uint8_t* scales = dst + code_bytes(type, cols);
    std::memset(scales, 0, row_bytes(type, cols) - code_bytes(type, cols));
    for (int b = 0; b < cols / 32; b++) {
        Block block = decode_block(type, src + size_t(b) * block_bytes(type));
        std::memcpy(&codes[size_t(b) * 32], block.codes, 32);
        std::memcpy(scales + b * 2, &block.scale, 2);
        if (has_min(type)) std::memcpy(scales + (blocks + b) * 2, &block.min, 2);
    }
    pack_codes(type, codes.data(), cols, dst);
}

void pack_down_group(Type type, const uint8_t* src, int width, int count, int group, uint8_t* records,
                     size_t stride, uint8_t* scales) {
    const int j0 = group * kGroup, n = std::min(kGroup, count - j0);
    const size_t src_row = file_row_bytes(type, count);
    if (!quantized(type)) {
        const size_t b = float_bytes(type);
        for (int j = 0; j < n; j++) {
            uint8_t* dst = records + size_t(j) * stride;
            for (int i = 0; i < width; i++)
                std::memcpy(dst + size_t(i) * b, src + size_t(i) * src_row + size_t(j0 + j) * b, b);
            std::memset(dst + size_t(width) * b, 0, code_bytes(type, width) - size_t(width) * b);
        }
        return;
    }
    const size_t padded = size_t(round_up(width, 64));
    thread_local std::vector<uint8_t> codes;
    codes.assign(padded * kGroup, 0);
    std::memset(scales, 0, padded * (has_min(type) ? 4 : 2));
    for (int i = 0; i < width; i++) {
        Block block = decode_block(type, src + size_t(i) * src_row + size_t(group) * block_bytes(type));
        std::memcpy(scales + size_t(i) * 2, &block.scale, 2);
        if (has_min(type)) std::memcpy(scales + (padded + size_t(i)) * 2, &block.min, 2);
        for (int j = 0; j < kGroup; j++) codes[size_t(j) * padded + size_t(i)] = block.codes[j];
    }
    for (int j = 0; j < n; j++)
        pack_codes(type, &codes[size_t(j) * padded], width, records + size_t(j) * stride);
}

void unpack_down_rows(const Neurons& n, int chunk, uint8_t* rows, size_t stride) {
    const Type t = n.down_type;
    const int c0 = chunk * 64, cols = std::min(64, n.width - c0);
    if (!quantized(t)) {
        const size_t b = float_bytes(t), row = size_t(n.count) * b;
        for (int j = 0; j < n.count; j++)
            for (int k = 0; k < cols; k++)
                std::memcpy(rows + size_t(k) * stride + size_t(j) * b, n.down(j) + size_t(c0 + k) * b, b);
        for (int k = 0; k < cols; k++) std::memset(rows + size_t(k) * stride + row, 0, stride - row);
        return;
    }
    const size_t padded = size_t(round_up(n.count, 64)), width = size_t(round_up(n.width, 64));
    thread_local std::vector<uint8_t> codes;
    codes.assign(padded * 64, 0);
    for (int j = 0; j < n.count; j++) {
        uint8_t column[64];
        unpack_chunk(t, n.down(j), int(width / 64), chunk, column);
        for (size_t k = 0; k < 64; k++) codes[k * padded + size_t(j)] = column[k];
    }
    for (int k = 0; k < cols; k++) {
        uint8_t* row = rows + size_t(k) * stride;
        uint8_t* scales = row + code_bytes(t, n.count);
        std::memset(scales, 0, stride - code_bytes(t, n.count));
        pack_codes(t, &codes[size_t(k) * padded], n.count, row);
        for (int g = 0; g < n.count / kGroup; g++) {
            const uint8_t* group = n.group_scales(g) + size_t(c0 + k) * 2;
            std::memcpy(scales + g * 2, group, 2);
            if (has_min(t)) std::memcpy(scales + (scale_blocks(n.count) + g) * 2, group + width * 2, 2);
        }
    }
}

}  // namespace prosparse
