// Numbers side by side: loads and stores with an end, sums in double precision, and the functions of one number that
// the operations share. Included inside an unnamed namespace, after the instruction set's `Vector`.

using Floats = Vector::Floats;
using Doubles = Vector::Doubles;
constexpr int W = Vector::lanes;

template <Element type>
constexpr std::int64_t kBytes = type == Element::f32 ? 4 : 2;

// calls function<type>(arguments...) for the type that `element` names; fp8 never comes here
#define STYLEFAST_BY_TYPE(element, function, ...)                        \
    switch (element) {                                                   \
        case Element::f32: function<Element::f32>(__VA_ARGS__); break;   \
        case Element::bf16: function<Element::bf16>(__VA_ARGS__); break; \
        default: function<Element::f16>(__VA_ARGS__); break;             \
    }

STYLEFAST_INLINE std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// fewer than W numbers, the other lanes `fill`
template <Element type>
__attribute__((noinline)) Floats load_rest(const char* from, std::int64_t count, float fill) {
    alignas(64) char bytes[4 * W] = {};
    alignas(64) float values[W];
    __builtin_memcpy(bytes, from, static_cast<std::size_t>(count * kBytes<type>));
    Vector::store(values, Vector::load_as<type>(bytes));
    for (std::int64_t i = count; i < W; ++i) values[i] = fill;
    return Vector::load(values);
}

template <Element type>
__attribute__((noinline)) void store_rest(char* to, std::int64_t count, Floats x) {
    alignas(64) char bytes[4 * W];
    Vector::store_as<type>(bytes, x);
    __builtin_memcpy(to, bytes, static_cast<std::size_t>(count * kBytes<type>));
}

// numbers i .. i + W of `count`; lanes past the end are `fill`
template <Element type>
STYLEFAST_INLINE Floats load_from(const char* from, std::int64_t i, std::int64_t count, float fill = 0.0f) {
    if (i + W <= count) return Vector::load_as<type>(from + i * kBytes<type>);
    return load_rest<type>(from + i * kBytes<type>, count - i, fill);
}

template <Element type>
STYLEFAST_INLINE void store_to(char* to, std::int64_t i, std::int64_t count, Floats x) {
    if (i + W <= count) return Vector::store_as<type>(to + i * kBytes<type>, x);
    store_rest<type>(to + i * kBytes<type>, count - i, x);
}

// the lanes of a vector in double precision
struct Wide {
    Doubles low, high;

    static STYLEFAST_INLINE Wide all(double x) { return {Vector::all_doubles(x), Vector::all_doubles(x)}; }
    static STYLEFAST_INLINE Wide of(Floats x) { return {Vector::low(x), Vector::high(x)}; }
    STYLEFAST_INLINE Wide operator+(Wide b) const { return {Vector::add(low, b.low), Vector::add(high, b.high)}; }
    STYLEFAST_INLINE Wide operator-(Wide b) const { return {Vector::sub(low, b.low), Vector::sub(high, b.high)}; }
    STYLEFAST_INLINE Wide operator*(Wide b) const { return {Vector::mul(low, b.low), Vector::mul(high, b.high)}; }
    STYLEFAST_INLINE Floats narrow() const { return Vector::narrow(low, high); }
    STYLEFAST_INLINE double total() const { return Vector::total(Vector::add(low, high)); }
};

STYLEFAST_INLINE Floats sum_of_four(Floats a, Floats b, Floats c, Floats d) {
    return Vector::add(Vector::add(a, b), Vector::add(c, d));
}

STYLEFAST_INLINE Floats squares_of_four(Floats a, Floats b, Floats c, Floats d) {
    const Floats one = Vector::fma(a, a, Vector::mul(b, b)), two = Vector::fma(c, c, Vector::mul(d, d));
    return Vector::add(one, two);
}

// mean, and sum of squared distances from it
struct Moments {
    double mean, squares;
};

// Measured from a centre that need only be near the mean, so that numbers far from 0 lose no digits. Four vectors meet
// in fp32, the rest of the sums is double: few roundings, at the speed of memory.
template <Element type>
Moments moments_about(const char* from, std::int64_t count, float centre) {
    constexpr std::int64_t step = W * kBytes<type>;
    const std::int64_t whole = count / (4 * W) * (4 * W);
    const Floats middle = Vector::all(centre);
    Wide sum = Wide::all(0.0), squares = Wide::all(0.0);
    for (std::int64_t i = 0; i < whole; i += 4 * W) {
        const char* x = from + i * kBytes<type>;
        const Floats a = Vector::sub(Vector::load_as<type>(x), middle);
        const Floats b = Vector::sub(Vector::load_as<type>(x + step), middle);
        const Floats c = Vector::sub(Vector::load_as<type>(x + 2 * step), middle);
        const Floats d = Vector::sub(Vector::load_as<type>(x + 3 * step), middle);
        sum = sum + Wide::of(sum_of_four(a, b, c, d));
        squares = squares + Wide::of(squares_of_four(a, b, c, d));
    }
    for (std::int64_t i = whole; i < count; i += W) {
        const Floats away = Vector::sub(load_from<type>(from, i, count, centre), middle);
        sum = sum + Wide::of(away);
        squares = squares + Wide::of(Vector::mul(away, away));
    }
    const double number = static_cast<double>(count), slip = sum.total() / number;
    const double distance = squares.total() - number * slip * slip;
    return {static_cast<double>(centre) + slip, distance < 0.0 ? 0.0 : distance};
}

template <Element type>
Moments span_moments(const char* from, std::int64_t count) {
    constexpr std::int64_t step = W * kBytes<type>;
    const std::int64_t whole = count / (4 * W) * (4 * W);
    Floats sum = Vector::zero();
    for (std::int64_t i = 0; i < whole; i += 4 * W) {
        const char* x = from + i * kBytes<type>;
        sum = Vector::add(sum, sum_of_four(Vector::load_as<type>(x), Vector::load_as<type>(x + step),
                                           Vector::load_as<type>(x + 2 * step), Vector::load_as<type>(x + 3 * step)));
    }
    for (std::int64_t i = whole; i < count; i += W) sum = Vector::add(sum, load_from<type>(from, i, count));
    return moments_about<type>(from, count, static_cast<float>(Wide::of(sum).total() / static_cast<double>(count)));
}

// 2^x on [0, 1) to 1e-8 before rounding, exactly 1 at 0
struct Exp2 {
    static STYLEFAST_INLINE Floats at(Floats x) {
        Floats y = Vector::fma(Vector::all(2.161291632e-4f), x, Vector::all(1.246784581e-3f));
        y = Vector::fma(y, x, Vector::all(9.675451554e-3f));
        y = Vector::fma(y, x, Vector::all(5.548528209e-2f));
        y = Vector::fma(y, x, Vector::all(0.2402293086f));
        y = Vector::fma(y, x, Vector::all(0.6931470633f));
        return Vector::fma(y, x, Vector::all(1.0f));
    }
};

constexpr float kLog2E = 1.44269504088896340736f;

// x / (1 + e^-x), from e^-|x| so that nothing overflows
STYLEFAST_INLINE Floats silu(Floats x) {
    const Floats one = Vector::all(1.0f);
    const Floats power = Vector::exp2<Exp2>(Vector::mul(Vector::magnitude(x), Vector::all(-kLog2E)));
    return Vector::div(Vector::mul(x, Vector::where_negative(x, power, one)), Vector::add(one, power));
}

// x (1 + erf(x / sqrt 2)) / 2. With t = |x| and u = 1 / (1 + 0.3 t), (1 - erf(t / sqrt 2)) / 2 is e^(-t^2 / 2) times a
// polynomial in u (fitted here to 4e-8), so that the negative side keeps its digits instead of taking a difference.
STYLEFAST_INLINE Floats gelu(Floats x) {
    const Floats one = Vector::all(1.0f), t = Vector::magnitude(x);
    const Floats u = Vector::div(one, Vector::fma(t, Vector::all(0.3f), one));
    Floats y = Vector::fma(Vector::all(0.0367335528f), u, Vector::all(-0.161313474f));
    y = Vector::fma(y, u, Vector::all(0.21281983f));
    y = Vector::fma(y, u, Vector::all(-0.0589568466f));
    y = Vector::fma(y, u, Vector::all(0.130921245f));
    y = Vector::fma(y, u, Vector::all(0.0993533209f));
    y = Vector::fma(y, u, Vector::all(0.120815054f));
    y = Vector::fma(y, u, Vector::all(0.119627334f));
    const Floats power = Vector::exp2<Exp2>(Vector::mul(Vector::mul(t, t), Vector::all(-0.5f * kLog2E)));
    const Floats beyond = Vector::mul(Vector::mul(y, u), power);
    return Vector::mul(x, Vector::where_negative(x, beyond, Vector::sub(one, beyond)));
}
