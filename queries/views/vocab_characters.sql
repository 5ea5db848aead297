-- Question: What is each entry of the vocabulary made of?
-- Formula: class = the script of a letter or mark, by its ISO 15924 code (Zyyy: a letter that several
--   scripts have in common; Zzzz: of another script than these); digit (Unicode N); punctuation (P and S:
--   symbols too). Spaces, control characters, marks of no script and bytes that are no whole character
--   (spelled <E3><81>) have no class.
-- Grain: one row per (token_id, class): characters of it.
-- Reads: vocab
with pieces as (
    select
        token_id,
        unnest(regexp_extract_all(token, '(?s).')) as character
    from vocab
    where not regexp_full_match(token, '(<[0-9A-F][0-9A-F]>)+')
),

alphabet as (
    select distinct character
    from pieces
    where regexp_matches(character, '[\p{L}\p{M}\p{N}\p{P}\p{S}]') and character != chr(65533)
),

classed as (
    select
        character,
        case
            when regexp_matches(character, '\p{N}') then 'digit'
            when regexp_matches(character, '[\p{P}\p{S}]') then 'punctuation'
            when regexp_matches(character, '\p{Latin}') then 'Latn'
            when regexp_matches(character, '\p{Han}') then 'Hani'
            when regexp_matches(character, '\p{Cyrillic}') then 'Cyrl'
            when regexp_matches(character, '\p{Arabic}') then 'Arab'
            when regexp_matches(character, '\p{Hangul}') then 'Hang'
            when regexp_matches(character, '\p{Hiragana}') then 'Hira'
            when regexp_matches(character, '\p{Katakana}') then 'Kana'
            when regexp_matches(character, '\p{Greek}') then 'Grek'
            when regexp_matches(character, '\p{Hebrew}') then 'Hebr'
            when regexp_matches(character, '\p{Devanagari}') then 'Deva'
            when regexp_matches(character, '\p{Thai}') then 'Thai'
            when regexp_matches(character, '\p{Armenian}') then 'Armn'
            when regexp_matches(character, '\p{Bengali}') then 'Beng'
            when regexp_matches(character, '\p{Bopomofo}') then 'Bopo'
            when regexp_matches(character, '\p{Canadian_Aboriginal}') then 'Cans'
            when regexp_matches(character, '\p{Cherokee}') then 'Cher'
            when regexp_matches(character, '\p{Ethiopic}') then 'Ethi'
            when regexp_matches(character, '\p{Georgian}') then 'Geor'
            when regexp_matches(character, '\p{Gujarati}') then 'Gujr'
            when regexp_matches(character, '\p{Gurmukhi}') then 'Guru'
            when regexp_matches(character, '\p{Javanese}') then 'Java'
            when regexp_matches(character, '\p{Kannada}') then 'Knda'
            when regexp_matches(character, '\p{Khmer}') then 'Khmr'
            when regexp_matches(character, '\p{Lao}') then 'Laoo'
            when regexp_matches(character, '\p{Malayalam}') then 'Mlym'
            when regexp_matches(character, '\p{Meetei_Mayek}') then 'Mtei'
            when regexp_matches(character, '\p{Mongolian}') then 'Mong'
            when regexp_matches(character, '\p{Myanmar}') then 'Mymr'
            when regexp_matches(character, '\p{Nko}') then 'Nkoo'
            when regexp_matches(character, '\p{Ol_Chiki}') then 'Olck'
            when regexp_matches(character, '\p{Oriya}') then 'Orya'
            when regexp_matches(character, '\p{Sinhala}') then 'Sinh'
            when regexp_matches(character, '\p{Syriac}') then 'Syrc'
            when regexp_matches(character, '\p{Tamil}') then 'Taml'
            when regexp_matches(character, '\p{Telugu}') then 'Telu'
            when regexp_matches(character, '\p{Thaana}') then 'Thaa'
            when regexp_matches(character, '\p{Tibetan}') then 'Tibt'
            when regexp_matches(character, '\p{Tifinagh}') then 'Tfng'
            when regexp_matches(character, '\p{Yi}') then 'Yiii'
            when regexp_matches(character, '\p{Common}') and regexp_matches(character, '\p{L}') then 'Zyyy'
            when regexp_matches(character, '\p{L}') then 'Zzzz'
        end as class
    from alphabet
)

select
    pieces.token_id,
    classed.class,
    count(*) as characters
from pieces
inner join classed using (character)
where classed.class is not null
group by pieces.token_id, classed.class
