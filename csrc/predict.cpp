// Predicted mode: the FFN of a decoded token for the neurons that a predictor names.
#include <algorithm>
#include <cstring>

#include "model.h"
#include "workspace.h"

namespace prosparse {

uint64_t Model::predict(const Layer& l) {
    Workspace& w = *ws_;
    const Predictor& p = l.predictor;
    if (p.kind == Predictor::Kind::sign) sign_bits(w.in.acts.f, config.hidden_size, w.signs.data());
    if (p.kind != Predictor::Kind::lowrank) return 0;
    const Acts* x = &w.in.acts;
    if (p.residual) {
        k_.quantize(w.x.data(), config.hidden_size, &w.residual.acts);
        x = &w.residual.acts;
    }
    const int rank = p.fc1.rows;
    if (int(w.predictor.f.size()) < round_up(rank, 64)) w.predictor.resize(rank);
    const uint64_t bytes = project({{&p.fc1, w.predictor.acts.f, nullptr}}, *x, 1.0f, false);
    k_.activate(ActFn::relu, 0.0f, w.predictor.acts.f, rank, w.predictor.acts.f);
    k_.quantize(w.predictor.acts.f, rank, &w.predictor.acts);
    return bytes;
}

namespace {

// What is computed of one group of neurons, while the weights of later ones are on their way.
struct Pending {
    int group = 0, n = 0;
    int neuron[kGroup];
    float act[kGroup];
};

constexpr int kGatesAhead = 16;  // candidates between the request for a gate and its use

}  // namespace

// Candidates are known before any of their weights is read, so gates are requested well ahead, and the rest
// of the neurons that turned out active one group ahead: line by line, while others are computed.
void Model::predicted_segment(const Layer& l, int first, int last, float* y, int segment) {
    Workspace& w = *ws_;
    const Neurons& n = l.neurons;
    const Predictor& p = l.predictor;
    const Acts& x = w.in.acts;
    const int j0 = first * kGroup, j1 = std::min(last * kGroup, n.count);
    float* score = &w.score[size_t(j0)];
    if (p.kind == Predictor::Kind::sign) {
        const int words = int(w.signs.size());
        k_.sign_scores(&p.signs[size_t(j0) * size_t(words)], j1 - j0, words, config.hidden_size,
                       w.signs.data(), score);
    } else {
        k_.matvec(&p.score, j0, j1, p.kind == Predictor::Kind::lowrank ? &w.predictor.acts : &x, score);
    }
    int* candidates = &w.candidates[size_t(j0)];
    int count = 0;
    for (int j = j0; j < j1; j++) {  // a score that is NaN names its neuron
        candidates[count] = j;
        count += !(score[j - j0] < p.threshold);
    }

    std::memset(y, 0, size_t(round_up(n.width, 64)) * 4);
    // the first candidate behind the group of candidate i
    auto end_of = [&](int i) {
        const int group = candidates[i] / kGroup;
        while (i < count && candidates[i] / kGroup == group) i++;
        return i;
    };
    auto gate_ahead = [&](int i) { return l.gate.row(candidates[std::min(i + kGatesAhead, count - 1)]); };
    Pending now, before;
    float x1[kGroup];
    const uint8_t* rows[kGroup];
    Wanted wanted(l.gate.stride);
    uint64_t active = 0;
    // computes the group before, while what `now` needs is requested
    auto finish = [&] {
        for (int i = 0; i < before.n; i++) {
            const uint8_t *up = n.up(before.neuron[i]), *next = wanted.next(up);
            x1[i] = before.act[i] * k_.dot(n.up_type, up, n.width, &x, next, wanted.next(up));
            rows[i] = n.down(before.neuron[i]);
        }
        if (before.n) k_.down(n.down_type, rows, x1, before.n, n.group_scales(before.group), n.width, y);
        active += uint64_t(before.n);
    };
    for (int i = 0; i < std::min(kGatesAhead, count); i++) prefetch(l.gate.row(candidates[i]), l.gate.stride);
    for (int i = 0; i < count;) {
        const int end = end_of(i), size = end - i;
        float pre[kGroup];
        for (int k = 0; k < size; k++) {
            const uint8_t* row = l.gate.row(candidates[i + k]);
            pre[k] = k_.dot(l.gate.type, row, n.width, &x, gate_ahead(i + k), wanted.next(row));
        }
        wanted.finish();
        k_.activate(config.hidden_act, config.hidden_act_param, pre, size, pre);
        now = {candidates[i] / kGroup, 0, {}, {}};
        for (int k = 0; k < size; k++) {
            if (pre[k] == 0.0f) continue;
            now.neuron[now.n] = candidates[i + k];
            now.act[now.n++] = pre[k];
            wanted.add(n.up(candidates[i + k]), n.record);
        }
        if (now.n) wanted.add(n.group_scales(now.group), n.scale_stride);
        finish();
        before = now;
        i = end;
    }
    now.n = 0;
    wanted.finish();
    finish();
    w.n_candidates[size_t(segment)] = uint64_t(count);
    w.active[size_t(segment)] = active;
}

void Model::ffn_predicted(Layer& l) {
    Workspace& w = *ws_;
    const Neurons& n = l.neurons;
    const Predictor& p = l.predictor;
    stats.decode_bytes += predict(l);
    const int groups = (n.count + kGroup - 1) / kGroup, width = round_up(n.width, 64);
    const int segments = std::min(kSegments, groups);
    pool_->run(segments, [&](int k, int) {
        const int s = in_stream(k, segments, n_threads());
        predicted_segment(l, groups * s / segments, groups * (s + 1) / segments,
                          &w.partial[size_t(s) * size_t(width)], s);
    });
    uint64_t active = 0, candidates = 0;
    for (int s = 0; s < segments; s++) {
        active += w.active[size_t(s)];
        candidates += w.n_candidates[size_t(s)];
        k_.add(w.x.data(), &w.partial[size_t(s) * size_t(width)], config.residual_scale, n.width);
    }
    stats.decode_active += active;
    stats.decode_candidates += candidates;
    // scales of a group are read where any of its neurons is active: nearly all groups
    stats.decode_bytes += p.score.stride * size_t(p.score.rows) + p.signs.size() * 8 +
                          l.gate.stride * candidates + n.record * active + n.scale_stride * size_t(groups);
}

}  // namespace prosparse
