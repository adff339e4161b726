"""The version of bellwether."""

VERSION = "0.1.0"
