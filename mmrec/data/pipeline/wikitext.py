"""Wikitext without its markup: what a reader of the article sees as running text."""

from __future__ import annotations

import re
from typing import Any

from mmrec.core.optional import optional_import

HIDDEN_NAMESPACES = {"-2": "Media", "6": "File", "14": "Category"}
"""Namespaces, by their number and English name, whose links show no text."""
_NAMES = """
afbeelding archivo arquivo attēls beeld berkas bestand bild bilde billede catagóir categori categoria categorie
category categoría catégorie datei datoteka delwedd dosiero dosya fail faili fasciculus fayl ficheiro fichier
figura fil file fitxategi fitxer fișier flokkur fájl gambar grafika hình image imagem imagen imagine imago
imatge imaxe imej immagine irudi jamii kategooria kategori kategoria kategorie kategorija kategorio kategória
kateqoriya kuva kép luokka lêer media medium mynd média obrázok picha pilt plik resim skeda slika soubor súbor
tiedosto vaizdas íomhá şəkil αρχείο εικόνα κατηγορία выява датотека зображення изображение картинка категория
категорија категорія катэгорыя медиа податотека санат слика сурет файл կատեգորիա պատկեր קובץ קטגוריה תמונה تصنيف
تصویر رده زمرہ صورة فائل ملف پرونده चित्र श्रेणी চিত্র বিষয়শ্রেণী பகுப்பு படிமம் దస్త్రం బొమ్మ వర్గం ภาพ
หมวดหมู่ ไฟล์ კატეგორია სურათი ფაილი カテゴリ ファイル 分类 分類 图像 圖像 文件 档案 檔案 画像 그림 분류 파일
"""
NAMES = frozenset({*_NAMES.split(), "tập tin", "thể loại"})
"""What the same namespaces are called in other languages, with old names that still work; in lower case."""
_LANGUAGES = """
aa ab ace ady af ak als alt am ami an ang ann anp ar arc ary arz as ast atj av avk awa ay az azb ba ban bar
bat-smg bbc bcl bdr be be-tarask be-x-old bew bg bh bi bjn blk bm bn bo bpy br bs btm bug bxr ca cbk-zam cdo ce
ceb ch cho chr chy ckb co cr crh cs csb cu cv cy da dag de dga din diq dsb dtp dty dv dz ee el eml en eo es et
eu ext fa fat ff fi fiu-vro fj fo fon fr frp frr fur fy ga gag gan gcr gd gl glk gn gom gor got gpe gsw gu guc
gur guw gv ha hak haw he hi hif ho hr hsb ht hu hy hyw hz ia iba id ie ig igl ii ik ilo inh io is it iu ja jam
jbo jv ka kaa kab kaj kbd kbp kcg kg kge ki kj kk kl km kn ko koi kr krc ks ksh ku kus kv kw ky la lad lb lbe
lez lfn lg li lij lld lmo ln lo lrc lt ltg lv lzh mad mai map-bms mdf mg mh mhr mi min mk ml mn mni mnw mo mos
mr mrj ms mt mus mwl my myv mzn na nah nan nap nds nds-nl ne new ng nia nl nn no nov nqo nr nrm nso nup nv ny oc
olo om or os pa pag pam pap pcd pcm pdc pfl pi pih pl pms pnb pnt ps pt pwn qu rm rmy rn ro roa-rup roa-tara rsk
ru rue rup rw sa sah sat sc scn sco sd se sg sgs sh shi shn si simple sk skr sl sm smn sn so sq sr srn ss st stq
su sv sw szl szy ta tay tcy tdd te tet tg th ti tig tk tl tly tn to tpi tr trv ts tt tum tw ty tyv udm ug uk ur
uz ve vec vep vi vls vo vro wa war wo wuu xal xh xmf yi yo yue za zea zgh zh zh-classical zh-min-nan zh-yue zu
"""
LANGUAGES = frozenset(_LANGUAGES.split())
"""Prefixes of links to the same article in another language, which show no text."""
UNREAD_TAGS = {"ref", "gallery", "timeline", "references", "imagemap", "graph", "score"}
"""Tags whose content is no running text."""
_SWITCH = re.compile(r"__[^\W_]+(?:_[^\W_]+)*__")
_REDIRECT = re.compile(r"\s*#[^\W\d_]+\s*:?\s*\[\[[^\]\n]+\]\]")


def is_redirect(text: str) -> bool:
    """Whether a page leads to another one, in any language: ``#WORD [[target]]`` at its beginning."""
    return _REDIRECT.match(text) is not None


def clean(text: str, hidden: frozenset[str] | set[str] = NAMES) -> str:
    """Return the running text of an article.

    Templates, files and their captions, categories, links to other languages, references, galleries and behaviour
    switches (``__NOTOC__``) go, as the reader of the page sees none of them in the text.

    Args:
        text: wikitext.
        hidden: names of the namespaces whose links show no text, in lower case.

    Raises:
        Exception: the parser's own, where markup is nested too deep.
    """
    code = optional_import("mwparserfromhell").parse(text)
    for link in code.filter_wikilinks():
        _hide(link, hidden)
    for tag in code.filter_tags(matches=lambda tag: str(tag.tag).strip().lower() in UNREAD_TAGS):
        tag.contents = ""
    stripped = str(code.strip_code())
    return _SWITCH.sub(lambda switch: "" if switch[0] == switch[0].upper() else switch[0], stripped).strip()


def _hide(link: Any, hidden: frozenset[str] | set[str]) -> None:
    """Make ``link`` show what the page shows of it."""
    title = str(link.title).strip()
    prefix, colon, _ = title.partition(":")
    if not colon:
        return
    if title.startswith(":"):  # shown as a link, whatever its namespace
        if link.text is None:
            link.title = title[1:]
        return
    name = " ".join(prefix.replace("_", " ").split()).lower()
    if name in hidden or name in LANGUAGES:
        link.text = ""
