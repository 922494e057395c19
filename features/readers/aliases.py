"""Usual names of columns and events, likeliest first."""

from __future__ import annotations


def words(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


USER = words("""user userid useridx uid personid visitorid customerid memberid accountid reviewerid
profileid buyerid usertoken author sessionid session""")
ITEM = words("""item itemid iid movieid articleid contentid productid product sku asin parentasin
videoid trackid songid bookid isbn newsid businessid restaurantid recipeid gameid adid objectid
itemtoken""")
TIME = words("""time timestamp ts datetime date createdat eventtime eventtimestamp unixreviewtime
unixtime impressiontime servertime epoch t""")
EVENT = words("""event eventtype action actiontype behavior behaviour behaviortype interaction
interactiontype type click clicked isclick label""")
VALUE = words("rating score stars value overall grade")
REQUEST = words("request requestid impressionid queryid slateid pageviewid recommendationid")
POSITION = words("position positions pos rank slot")
DWELL = words("dwell dwelltime readtime watchtime playtime timespent durationseconds")
DEVICE = words("device devicetype page")
SHOWN = words("""shown shownitems inview articleidsinview impressions impressionlist slate
candidates displayed""")
CLICKED = words("clicked clickeditems articleidsclicked clicks chosen selected")
ITEMS = words("items itemids sequence history itemsequence itemlist movieids")
TITLE = words("title name itemname productname producttitle headline movietitle")
TEXT = words("subtitle description abstract summary overview body text caption tagline plot")
CATEGORY = words("""category categories subcategory subcat genre genres brand tag tags topic topics
keywords department color colour type producttype categorystr language""")
PUBLISHED = words("""published publishedtime publishedat releasedate releasetime createdat created
publishtime uploadtime""")

SEEN = words("""impression impressions shown show exposure expose display displayed imp 0 false""")
NOT_THIS = words("""dislike skip skipped hide hidden notinterested unlike downvote thumbsdown remove
removed delete report block""")
STRENGTH = {
    3.0: words("buy purchase purchased transaction order checkout subscribe conversion"),
    2.0: words("""cart addtocart addcart tocart like liked bookmark follow favorite favourite fav
    share save comment commentcreated wishlist download"""),
    1.0: words("""click clicked view viewed open read watch play listen pv visit pageview detail
    contentview itemview 1 true"""),
}
"""How strong a positive an event name speaks of."""
