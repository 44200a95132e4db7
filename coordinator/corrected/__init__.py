"""The corrected pass: all layers' experts in one round trip, approximately.

A forward pass needs the experts F of layer l before it knows what layer l + 1 will ask for: a round
trip a layer. Here a pass runs with a stand-in G for the experts and notes what every layer would
have asked (its input, its routing); all layers' calls then travel together; and the next pass adds

    F(noted input) + G(input now) - G(noted input)

in place of the experts. That is exact where the input is what was noted, and first-order right
nearby. Each such sweep costs one round trip. The first layer is exact after one sweep, and layer n
after n: after as many sweeps as the model has layers the pass is the exact one, bit for bit.

    window.py           rows of one layer: what they asked, what G made of it, what came back
    surrogate.py        what G is
    experts.py          F + G - G, as a forward pass calls for its experts
    corrected_pass.py   the stand-in's pass and the sweeps
"""
