// The contrast of images with what is encoded jointly with them, with texts and with what was retrieved for both. A block works on the
// image blockIdx.x.
#include "device.cuh"

// Scores, or gradients by them, each [rows, columns] below; null where there are none. The temperature divides all but the last.
//   0  images, all texts
//   1  texts of the images, all images
//   2  images retrieved for the images, texts of the images
//   3  images, texts retrieved for them
//   4  pairs
constexpr uint32_t KINDS = 5, PAIRS = 4;

struct Sizes {
    uint32_t images, all_texts, texts, all_images, found_images, found_texts, pairs;
};

// Who belongs to whom, as the host lists it: others' texts and images that come before; where the texts, the retrieved images, the
// retrieved texts and the pairs of each image begin, and the end, four times images + 1; those lists; whether each pair belongs together;
// and the image of each text and of each retrieved text.
struct Related {
    uint32_t first_text, first_image;
    const uint32_t *starts[4], *lists[4], *fits, *of_texts, *of_found_texts;

    __device__ __forceinline__ Related(const uint32_t* words, const Sizes& sizes) : first_text(words[0]), first_image(words[1]) {
        words += 2;
        for (uint32_t i = 0; i < 4; i++, words += sizes.images + 1) starts[i] = words;
        const uint32_t counts[4] = {sizes.texts, sizes.found_images, sizes.found_texts, sizes.pairs};
        for (uint32_t i = 0; i < 4; words += counts[i], i++) lists[i] = words;
        fits = words;
        of_texts = fits + sizes.pairs;
        of_found_texts = of_texts + sizes.texts;
    }
};

// Calls visit(kind, place, member, positive) for every score of the block's image, and for those that no image has which lie in the same
// rows: nobody else visits these. The block's threads share out the scores.
template <typename Visit>
__device__ __forceinline__ void visit_scores(const Related& of, const Sizes& sizes, Visit visit) {
    uint32_t image = blockIdx.x, turn = threadIdx.x, turns = blockDim.x;
    for (uint32_t i = turn; i < sizes.all_texts; i += turns) {
        uint32_t text = i - of.first_text;
        visit(0, size_t(image) * sizes.all_texts + i, true, text < sizes.texts && of.of_texts[text] == image);
    }
    for (uint32_t k = of.starts[0][image]; k < of.starts[0][image + 1]; k++) {
        size_t row = size_t(of.lists[0][k]) * sizes.all_images;
        for (uint32_t i = turn; i < sizes.all_images; i += turns) visit(1, row + i, i != of.first_image + image, false);
    }
    for (uint32_t k = of.starts[1][image]; k < of.starts[1][image + 1]; k++) {
        size_t row = size_t(of.lists[1][k]) * sizes.texts;
        for (uint32_t i = turn; i < sizes.texts; i += turns) {
            bool own = of.of_texts[i] == image;
            visit(2, row + i, own, own);
        }
    }
    for (uint32_t i = turn; i < sizes.found_texts; i += turns) {
        bool own = of.of_found_texts[i] == image;
        visit(3, size_t(image) * sizes.found_texts + i, own, own);
    }
    for (uint32_t k = of.starts[3][image] + turn; k < of.starts[3][image + 1]; k += turns) {
        uint32_t pair = of.lists[3][k];
        visit(PAIRS, pair, true, of.fits[pair] != 0);
    }
}

// Of all scores of the block's image and of those of what belongs to it: the largest, and the sum of exponentials.
struct Attraction {
    float turn, most, sum, most_own, sum_own;

    __device__ __forceinline__ Attraction(
        const float* const (&scores)[KINDS], const float* temperature, const Related& of, const Sizes& sizes, float* partial
    )
        : turn(1.0f / *temperature), most(-INFINITY), sum(0), most_own(-INFINITY), sum_own(0) {
        visit_scores(of, sizes, [&](uint32_t kind, size_t place, bool member, bool positive) {
            float score = at(scores, kind, place);
            if (member) most = fmaxf(most, score);
            if (positive) most_own = fmaxf(most_own, score);
        });
        most = block_max(most, partial);
        most_own = block_max(most_own, partial);
        visit_scores(of, sizes, [&](uint32_t kind, size_t place, bool member, bool positive) {
            float score = at(scores, kind, place);
            if (member) sum += expf(score - most);
            if (positive) sum_own += expf(score - most_own);
        });
        sum = block_sum(sum, partial);
        sum_own = block_sum(sum_own, partial);
    }

    __device__ __forceinline__ float at(const float* const (&scores)[KINDS], uint32_t kind, size_t place) const {
        return kind == PAIRS ? scores[kind][place] : scores[kind][place] * turn;
    }

    // Whether the image is attracted to anything.
    __device__ __forceinline__ bool is_there() const { return sum_own > 0; }
};

// values[image] = −ln( Σ₊ / Σ ); 0 of an image that is attracted to nothing.
extern "C" __global__ void cross_modal(
    const float* with_texts, const float* with_images, const float* retrieved_images, const float* retrieved_texts,
    const float* logits, const float* temperature, const uint32_t* words, float* values, uint32_t all_texts, uint32_t texts,
    uint32_t all_images, uint32_t found_images, uint32_t found_texts, uint32_t pairs
) {
    SHARED(float, partial);
    Sizes sizes = {gridDim.x, all_texts, texts, all_images, found_images, found_texts, pairs};
    const float* const scores[KINDS] = {with_texts, with_images, retrieved_images, retrieved_texts, logits};
    Related of(words, sizes);
    Attraction all(scores, temperature, of, sizes, partial);
    float value = all.most - all.most_own + logf(all.sum) - logf(all.sum_own);
    if (threadIdx.x == 0) values[blockIdx.x] = all.is_there() ? value : 0.0f;
}

// Gradients of `factor` times the sum of these values, of which `dy` is the gradient by that: by all scores, and each image's part of
// that by the temperature.
extern "C" __global__ void cross_modal_backward(
    const float* with_texts, const float* with_images, const float* retrieved_images, const float* retrieved_texts,
    const float* logits, const float* temperature, const uint32_t* words, const float* dy, float* by_texts, float* by_images,
    float* by_retrieved_images, float* by_retrieved_texts, float* by_logits, float* by_temperature, uint32_t all_texts,
    uint32_t texts, uint32_t all_images, uint32_t found_images, uint32_t found_texts, uint32_t pairs, float factor
) {
    SHARED(float, partial);
    Sizes sizes = {gridDim.x, all_texts, texts, all_images, found_images, found_texts, pairs};
    const float* const scores[KINDS] = {with_texts, with_images, retrieved_images, retrieved_texts, logits};
    float* const by[KINDS] = {by_texts, by_images, by_retrieved_images, by_retrieved_texts, by_logits};
    Related of(words, sizes);
    Attraction all(scores, temperature, of, sizes, partial);
    float scale = all.is_there() ? *dy * factor : 0.0f, of_image = 0;
    visit_scores(of, sizes, [&](uint32_t kind, size_t place, bool member, bool positive) {
        float score = all.at(scores, kind, place), share = 0;
        if (scale != 0.0f) {
            if (member) share += expf(score - all.most) / all.sum;
            if (positive) share -= expf(score - all.most_own) / all.sum_own;
        }
        float by_score = scale * share;
        by[kind][place] = kind == PAIRS ? by_score : by_score * all.turn;
        if (kind != PAIRS) of_image -= by_score * score;
    });
    of_image = block_sum(of_image, partial) * all.turn;
    if (threadIdx.x == 0) by_temperature[blockIdx.x] = of_image;
}
