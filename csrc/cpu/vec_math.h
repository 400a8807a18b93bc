// Functions of a whole vector, to about one unit in the last place.
#pragma once
#include "vec.h"

namespace pyfinetune {
namespace PYFINETUNE_ISA {
namespace {

// e^x. Underflows to zero, overflows to infinity, NaN stays NaN.
//
// x = n ln 2 + r with |r| <= ln 2 / 2, ln 2 in two parts so that r is exact; e^r by a polynomial of degree 6 (the
// coefficients are those of Cephes' expf).
inline Vec vexp(Vec x) {
  x = vmax(vset(-104.0f), vmin(vset(89.0f), x));  // in this order NaN passes through both
  const Vec n = vround(vmul(x, vset(1.44269504088896341f)));
  Vec r = vfma(n, vset(-0.693359375f), x);
  r = vfma(n, vset(2.12194440e-4f), r);
  Vec p = vset(1.9875691500e-4f);
  p = vfma(p, r, vset(1.3981999507e-3f));
  p = vfma(p, r, vset(8.3334519073e-3f));
  p = vfma(p, r, vset(4.1665795894e-2f));
  p = vfma(p, r, vset(1.6666665459e-1f));
  p = vfma(p, r, vset(5.0000001201e-1f));
  return vscale2(vfma(vmul(r, r), p, vadd(r, vset(1.0f))), n);
}

// 2^x for x <= 127; underflows to zero, NaN stays NaN. The polynomial is a minimax fit of (2^r - 1) / r on [-1/2, 1/2].
inline Vec vexp2(Vec x) {
  x = vmax(vset(-160.0f), x);
  const Vec n = vround(x), r = vsub(x, n);
  Vec p = vset(1.53533620e-4f);
  p = vfma(p, r, vset(1.33988750e-3f));
  p = vfma(p, r, vset(9.61843692e-3f));
  p = vfma(p, r, vset(5.55033237e-2f));
  p = vfma(p, r, vset(2.40226477e-1f));
  p = vfma(p, r, vset(6.93147182e-1f));
  return vscale2(vfma(p, r, vset(1.0f)), n);
}

// The quotient loses the digits of a small x to 1 - 1, so a polynomial in x^2 (Cephes' tanhf) takes |x| < 5/8.
inline Vec vtanh(Vec x) {
  const Vec x2 = vmul(x, x);
  Vec p = vset(-5.70498872745e-3f);
  p = vfma(p, x2, vset(2.06390887954e-2f));
  p = vfma(p, x2, vset(-5.37397155531e-2f));
  p = vfma(p, x2, vset(1.33314422036e-1f));
  p = vfma(p, x2, vset(-3.33332819422e-1f));
  const Vec small = vfma(vmul(p, x2), x, x);
  const Vec large = vsub(vset(1.0f), vdiv(vset(2.0f), vadd(vexp(vadd(x, x)), vset(1.0f))));
  return vwhere_less(x2, vset(0.390625f), small, large);
}

// 1 / (1 + e^-x), without cancellation at either end.
inline Vec vsigmoid(Vec x) { return vdiv(vset(1.0f), vadd(vset(1.0f), vexp(vsub(vzero(), x)))); }

}  // namespace
}  // namespace PYFINETUNE_ISA
}  // namespace pyfinetune
