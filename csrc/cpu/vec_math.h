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

// 1 / x by one Newton step from the hardware's estimate, about a fifth of a division. 1 / infinity is 0; results below
// the smallest normal number may be 0 too.
inline Vec vrcp(Vec x) {
  const Vec y = vrcp_rough(x);
  // The residual is tiny, but NaN where x is zero or infinite, and y is right already: then vmin gives 1.
  return vfma(y, vmin(vfnma(x, y, vset(1.0f)), vset(1.0f)), y);
}

// 1 / (1 + e^-x), without cancellation at either end.
inline Vec vsigmoid(Vec x) { return vrcp(vadd(vset(1.0f), vexp(vsub(vzero(), x)))); }

// The same and 1 - sigmoid(x), which is not taken as a difference either.
inline Vec vsigmoid(Vec x, Vec* complement) {
  const Vec e = vexp(vsub(vzero(), x)), s = vrcp(vadd(vset(1.0f), e));
  *complement = vmul(vmin(e, vset(3e38f)), s);  // where e is infinite s is zero
  return s;
}

// The normal distribution function, and its density e^(-x^2 / 2) / sqrt(2 pi).
//
// The tail beyond |x| is e^(-x^2 / 2) times a function without scale: half of erfcx(|x| / sqrt 2), here t times a
// polynomial of degree 8 in t = 1 / (1 + 0.38 |x| / sqrt 2), fitted to 2e-8 relative; so small tails are as good
// relatively as large ones. Where |x| < 1.25 it is 1/2 + x times a polynomial of degree 5 in x^2, fitted to 1e-8.
inline Vec vnormal(Vec x, Vec* density) {
  const Vec size = vmax(x, vsub(vzero(), x)), square = vmul(x, x);
  const Vec t = vrcp(vfma(size, vset(0.268700577f), vset(1.0f)));
  const Vec e = vexp(vmul(square, vset(-0.5f)));
  Vec p = vset(0.0589652750f);
  p = vfma(p, t, vset(-0.262272041f));
  p = vfma(p, t, vset(0.363839524f));
  p = vfma(p, t, vset(-0.161429847f));
  p = vfma(p, t, vset(0.230001442f));
  p = vfma(p, t, vset(0.138661632f));
  p = vfma(p, t, vset(0.203903253f));
  p = vfma(p, t, vset(0.213919850f));
  p = vfma(p, t, vset(0.214410932f));
  const Vec tail = vmul(vmul(p, t), vmul(e, vset(0.5f)));
  Vec q = vset(-6.80949044e-6f);
  q = vfma(q, square, vset(1.11041122e-4f));
  q = vfma(q, square, vset(-1.18383715e-3f));
  q = vfma(q, square, vset(9.97228272e-3f));
  q = vfma(q, square, vset(-6.64902079e-2f));
  q = vfma(q, square, vset(0.398942277f));
  *density = vmul(e, vset(0.398942280f));
  const Vec outer = vselect_negative(x, tail, vsub(vset(1.0f), tail));
  return vselect_negative(vsub(size, vset(1.25f)), vfma(x, q, vset(0.5f)), outer);
}

// With t = e^2|x| - 1, made without cancellation: tanh |x| = t / (t + 2), or 1 - 2 / (t + 2) where that rounds less.
inline Vec vtanh(Vec x) {
  const Vec size = vmax(vsub(vzero(), x), x), edge = vsub(vset(0.55f), size), one = vset(1.0f), two = vset(2.0f);
  const Vec y = vmin(vset(20.0f), vadd(size, size));  // in this order NaN passes through
  const Vec n = vround(vmul(y, vset(1.44269504088896341f)));
  Vec r = vfma(n, vset(-0.693359375f), y);
  r = vfma(n, vset(2.12194440e-4f), r);
  Vec p = vset(1.9875691500e-4f);
  p = vfma(p, r, vset(1.3981999507e-3f));
  p = vfma(p, r, vset(8.3334519073e-3f));
  p = vfma(p, r, vset(4.1665795894e-2f));
  p = vfma(p, r, vset(1.6666665459e-1f));
  p = vfma(p, r, vset(5.0000001201e-1f));
  const Vec power = vscale2(one, n);
  const Vec t = vfma(power, vfma(vmul(r, r), p, r), vsub(power, one));
  const Vec part = vdiv(vselect_negative(edge, two, t), vadd(t, two));
  const Vec result = vselect_negative(edge, vsub(one, part), part);
  return vselect_negative(x, vsub(vzero(), result), result);
}

// The same functions for results that are rounded to 16 bits at once: to 13 bits relative or better, at half the cost.

// e^x. x / ln 2 = n + f with |f| <= 1/2, and 2^f by a polynomial of degree 4, fitted to 3e-6.
inline Vec vexp_rough(Vec x) {
  x = vmax(vset(-150.0f), vmin(vset(128.5f), vmul(x, vset(1.44269504088896341f))));
  const Vec n = vround(x), f = vsub(x, n);
  Vec p = vset(9.57010001e-3f);
  p = vfma(p, f, vset(5.59178602e-2f));
  p = vfma(p, f, vset(0.240247449f));
  p = vfma(p, f, vset(0.693121815f));
  p = vfma(p, f, vset(0.999999261f));
  return vscale2(p, n);
}

inline Vec vsigmoid_rough(Vec x, Vec* complement) {
  const Vec e = vexp_rough(vsub(vzero(), x)), s = vrcp_rough(vadd(vset(1.0f), e));
  *complement = vmul(vmin(e, vset(3e38f)), s);
  return s;
}

// As in vnormal, by the tail alone: degree 5 in t = 1 / (1 + 0.44 |x| / sqrt 2), fitted to 5e-6.
inline Vec vnormal_rough(Vec x, Vec* density) {
  const Vec t = vrcp_rough(vfma(vmax(x, vsub(vzero(), x)), vset(0.311126984f), vset(1.0f)));
  const Vec e = vexp_rough(vmul(vmul(x, x), vset(-0.5f)));
  Vec p = vset(-0.146104473f);
  p = vfma(p, t, vset(0.350648221f));
  p = vfma(p, t, vset(0.0407369137f));
  p = vfma(p, t, vset(0.263582604f));
  p = vfma(p, t, vset(0.242570679f));
  p = vfma(p, t, vset(0.248560888f));
  const Vec tail = vmul(vmul(p, t), vmul(e, vset(0.5f)));
  *density = vmul(e, vset(0.398942280f));
  return vselect_negative(x, tail, vsub(vset(1.0f), tail));
}

}  // namespace
}  // namespace PYFINETUNE_ISA
}  // namespace pyfinetune
