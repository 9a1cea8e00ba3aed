// candle's kernels that training uses, for the processor: what candle-kernels 0.11 computes, parameter for parameter, and not how.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <type_traits>

namespace candle {

struct Kernel {
    void (*run)(void** values);
};

template <typename T>
T argument(void** values, int at) {
    return *static_cast<T*>(values[at]);
}

// Dimensions, and the strides of one or several arrays; where they are missing, all are contiguous.
struct Layouts {
    size_t rank;
    const size_t* info;

    size_t at(size_t i, int array) const {
        if (!info) return i;
        size_t place = 0;
        for (size_t d = rank; d-- > 0;) {
            place += i % info[d] * info[(array + 1) * rank + d];
            i /= info[d];
        }
        return place;
    }
};

template <typename T, T (*F)(T)>
void unary(void** v) {
    auto count = argument<size_t>(v, 0);
    Layouts layouts{argument<size_t>(v, 1), argument<const size_t*>(v, 2)};
    auto x = argument<const T*>(v, 3);
    auto y = argument<T*>(v, 4);
    for (size_t i = 0; i < count; i++) y[i] = F(x ? x[layouts.at(i, 0)] : y[i]);
}

template <typename From, typename To>
void cast(void** v) {
    auto count = argument<size_t>(v, 0);
    Layouts layouts{argument<size_t>(v, 1), argument<const size_t*>(v, 2)};
    auto x = argument<const From*>(v, 3);
    auto y = argument<To*>(v, 4);
    for (size_t i = 0; i < count; i++) y[i] = To(x[layouts.at(i, 0)]);
}

template <typename T, typename Out, Out (*F)(T, T)>
void binary(void** v) {
    auto count = argument<size_t>(v, 0);
    Layouts layouts{argument<size_t>(v, 1), argument<const size_t*>(v, 2)};
    auto a = argument<const T*>(v, 3), b = argument<const T*>(v, 4);
    auto y = argument<Out*>(v, 5);
    for (size_t i = 0; i < count; i++) y[i] = F(a[layouts.at(i, 0)], b[layouts.at(i, 1)]);
}

template <typename T>
void affine(void** v) {
    auto count = argument<size_t>(v, 0);
    Layouts layouts{argument<size_t>(v, 1), argument<const size_t*>(v, 2)};
    auto x = argument<const T*>(v, 3);
    auto y = argument<T*>(v, 4);
    auto factor = argument<T>(v, 5), term = argument<T>(v, 6);
    for (size_t i = 0; i < count; i++) y[i] = (x ? x[layouts.at(i, 0)] : y[i]) * factor + term;
}

template <typename Condition, typename T>
void where(void** v) {
    auto count = argument<size_t>(v, 0);
    Layouts layouts{argument<size_t>(v, 1), argument<const size_t*>(v, 2)};
    auto condition = argument<const Condition*>(v, 3);
    auto a = argument<const T*>(v, 4), b = argument<const T*>(v, 5);
    auto y = argument<T*>(v, 6);
    for (size_t i = 0; i < count; i++) y[i] = condition[layouts.at(i, 0)] ? a[layouts.at(i, 1)] : b[layouts.at(i, 2)];
}

// The last `each` of the values in order make one result.
template <typename T, T (*F)(T, T)>
void reduce(size_t results, size_t each, Layouts layouts, const T* x, T* y) {
    for (size_t i = 0; i < results; i++) {
        T value = each > 0 ? x[layouts.at(i * each, 0)] : T(0);
        for (size_t j = 1; j < each; j++) value = F(value, x[layouts.at(i * each + j, 0)]);
        y[i] = value;
    }
}

template <typename T, T (*F)(T, T), bool BY_RESULTS>
void reduction(void** v) {
    auto count = argument<size_t>(v, 0), each = argument<size_t>(v, 1);
    Layouts layouts{argument<size_t>(v, 2), argument<const size_t*>(v, 3)};
    reduce<T, F>(BY_RESULTS ? count : count / each, each, layouts, argument<const T*>(v, 4), argument<T*>(v, 5));
}

template <typename T>
void copy2d(void** v) {
    auto from = argument<const T*>(v, 0);
    auto to = argument<T*>(v, 1);
    auto rows = argument<uint32_t>(v, 2), columns = argument<uint32_t>(v, 3);
    auto from_stride = argument<uint32_t>(v, 4), to_stride = argument<uint32_t>(v, 5);
    for (size_t row = 0; row < rows; row++)
        for (size_t column = 0; column < columns; column++) to[row * to_stride + column] = from[row * from_stride + column];
}

template <typename T>
void set(void** v) {
    auto count = argument<size_t>(v, 0);
    Layouts layouts{argument<size_t>(v, 1), argument<const size_t*>(v, 2)};
    auto value = argument<T>(v, 3);
    auto y = argument<T*>(v, 4);
    for (size_t i = 0; i < count; i++) y[layouts.at(i, 0)] = value;
}

template <typename T>
T sum(T a, T b) { return a + b; }
template <typename T>
T difference(T a, T b) { return a - b; }
template <typename T>
T product(T a, T b) { return a * b; }
template <typename T>
T quotient(T a, T b) { return a / b; }
// Either, where one is no number: candle's keep it.
template <typename T>
T larger(T a, T b) { return a != a ? a : b != b ? b : a > b ? a : b; }
template <typename T>
T smaller(T a, T b) { return a != a ? a : b != b ? b : a < b ? a : b; }
template <typename T>
uint8_t equal(T a, T b) { return a == b; }
template <typename T>
uint8_t greater(T a, T b) { return a > b; }
template <typename T>
uint8_t greater_or_equal(T a, T b) { return a >= b; }
template <typename T>
uint8_t less(T a, T b) { return a < b; }
template <typename T>
T same(T x) { return x; }

inline float negative(float x) { return -x; }
inline float exponential(float x) { return std::exp(x); }
inline float logarithm(float x) { return std::log(x); }
inline float square(float x) { return x * x; }
inline float root(float x) { return std::sqrt(x); }
inline float positive(float x) { return x > 0 ? x : x < 0 ? 0 : x; }
inline float magnitude(float x) { return std::fabs(x); }
inline float hyperbolic(float x) { return std::tanh(x); }
inline float reciprocal(float x) { return 1 / x; }

inline const Kernel* find(const std::string& name) {
    static const std::map<std::string, Kernel> kernels = {
        {"affine_f32", {affine<float>}},
        {"badd_f32", {binary<float, float, sum<float>>}},
        {"bsub_f32", {binary<float, float, difference<float>>}},
        {"bmul_f32", {binary<float, float, product<float>>}},
        {"bdiv_f32", {binary<float, float, quotient<float>>}},
        {"bmaximum_f32", {binary<float, float, larger<float>>}},
        {"bminimum_f32", {binary<float, float, smaller<float>>}},
        {"eq_f32", {binary<float, uint8_t, equal<float>>}},
        {"eq_u32", {binary<uint32_t, uint8_t, equal<uint32_t>>}},
        {"ge_f32", {binary<float, uint8_t, greater_or_equal<float>>}},
        {"gt_f32", {binary<float, uint8_t, greater<float>>}},
        {"lt_f32", {binary<float, uint8_t, less<float>>}},
        {"cast_u8_f32", {cast<uint8_t, float>}},
        {"cast_u32_f32", {cast<uint32_t, float>}},
        {"const_set_f32", {set<float>}},
        {"copy2d_f32", {copy2d<float>}},
        {"copy2d_u32", {copy2d<uint32_t>}},
        {"fast_max_f32", {reduction<float, larger<float>, false>}},
        {"fast_sum_f32", {reduction<float, sum<float>, false>}},
        {"fast_sum_small_f32", {reduction<float, sum<float>, true>}},
        {"uabs_f32", {unary<float, magnitude>}},
        {"ucopy_f32", {unary<float, same<float>>}},
        {"ucopy_u32", {unary<uint32_t, same<uint32_t>>}},
        {"uexp_f32", {unary<float, exponential>}},
        {"ulog_f32", {unary<float, logarithm>}},
        {"uneg_f32", {unary<float, negative>}},
        {"urecip_f32", {unary<float, reciprocal>}},
        {"urelu_f32", {unary<float, positive>}},
        {"usqr_f32", {unary<float, square>}},
        {"usqrt_f32", {unary<float, root>}},
        {"utanh_f32", {unary<float, hyperbolic>}},
        {"where_u8_f32", {where<uint8_t, float>}},
    };
    auto found = kernels.find(name);
    return found == kernels.end() ? nullptr : &found->second;
}

}  // namespace candle
