"""A text to measure fidelity on where none is given: plain English that small models know."""

PASSAGE = """\
Once upon a time there was an old fisherman who lived alone in a small house by the sea. Every \
morning he walked down to the harbour, looked at the sky, and decided whether the day was fit for \
sailing. One winter morning the wind was so strong that all the other boats stayed at home, but \
the fisherman had no bread left, and so he pushed his boat into the water.

He had not gone far when a great wave lifted the boat and threw it against a rock. The mast broke, \
and cold water ran over his feet. "I have been a fool," he said, "to trade my life for a loaf of \
bread." At that moment a seal came up beside the boat. It looked at him with round dark eyes, took \
the end of the rope between its teeth, and began to swim towards the shore.

The people of the village had seen what happened. They ran to the beach with blankets and hot \
soup, and when they asked him how he had been saved, the old man only pointed at the water. From \
that day on he threw one fish of every catch back into the sea, and whenever the children asked \
him why, he answered that a debt is not smaller because the one you owe it to cannot speak.

The lesson of this story is simple. Do not go out in a storm when you can ask your neighbours for \
bread, and do not forget those who helped you when you had nothing to give them in return.
"""
