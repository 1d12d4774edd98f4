"""How the video miniature is made: what moves, how it is drawn, trained and checked."""
