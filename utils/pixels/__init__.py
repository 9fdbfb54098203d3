"""From a picture or video file to pixels as viewers show them."""
