// Words that are floats; see tile_kernel.h. Included inside an unnamed namespace, after it.

struct FloatCompute {
    static constexpr int values = 1;

    static STYLEFAST_INLINE Floats step(Floats sum, Floats left, Floats right) { return Vector::fma(left, right, sum); }

    // 2^x on [0, 1) to 1.6e-7, exactly 1 at 0 so that a maximum that stays rescales by 1
    struct Exp2 {
        static STYLEFAST_INLINE Floats at(Floats x) {
            Floats y = Vector::fma(Vector::all(1.867130072e-3f), x, Vector::all(9.017030316e-3f));
            y = Vector::fma(y, x, Vector::all(5.579991311e-2f));
            y = Vector::fma(y, x, Vector::all(0.2401644502f));
            y = Vector::fma(y, x, Vector::all(0.6931513118f));
            return Vector::fma(y, x, Vector::all(1.0f));
        }
    };
};
