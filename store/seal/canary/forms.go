package canary

import (
	"bytes"
	"encoding/base32"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"strings"
	"unicode/utf16"
)

// form is a way to encode a value.
type form struct {
	name string
	// of returns what data, encoded together with whatever is before and behind it,
	// surely contains one of. The results for a longer value that begins with data
	// begin, one by one, with those for data.
	of func(data []byte) [][]byte
}

// forms are the ways in which programs write strings and bytes. URLs, JSON, XML, and
// quoting for Go, shells and protobuf's text format leave letters and digits alone,
// so that "as it is" finds them; those that are escaped all the same have a row.
var forms = []form{
	{"as it is", func(b []byte) [][]byte { return [][]byte{b} }},
	{"base64", func(b []byte) [][]byte { return aligned(b, 3, 4, base64.StdEncoding.EncodeToString) }},
	{"base32", func(b []byte) [][]byte { return aligned(b, 5, 8, base32.StdEncoding.EncodeToString) }},
	{"hexadecimal", one(hex.EncodeToString)},
	{"hexadecimal, upper case", one(func(b []byte) string { return strings.ToUpper(hex.EncodeToString(b)) })},
	{"hexadecimal with spaces", each("%02x", " ")},
	{"hexadecimal with colons", each("%02x", ":")},
	{"hex dump in words of two bytes", words(2, binary.BigEndian.Uint16, "%04x", " ")}, // xxd
	{"hex dump in words of two bytes, little endian", words(2, binary.LittleEndian.Uint16, "%04x", " ")},
	{"hex escapes", each(`\x%02x`, "")},
	{"Go's %#v of bytes", each("0x%02x", ", ")},
	{"Go's %v of bytes", each("%d", " ")},
	{"JSON list of bytes", each("%d", ",")},
	{"list of bytes", each("%d", ", ")},
	{"octal escapes", each(`\%03o`, "")},
	{"percent escapes", each("%%%02X", "")},
	{"percent escapes, lower case", each("%%%02x", "")},
	{"unicode escapes", each(`\u%04x`, "")},
	{"UTF-16, big endian", utf(binary.BigEndian.AppendUint16)},
	{"UTF-16, little endian", utf(binary.LittleEndian.AppendUint16)},
	{"words of a Go trace", traceWords},
}

// Forms are the names of the forms that are searched for.
func Forms() (names []string) {
	for _, f := range forms {
		names = append(names, f.name)
	}
	return names
}

func one(encode func([]byte) string) func([]byte) [][]byte {
	return func(b []byte) [][]byte { return [][]byte{[]byte(encode(b))} }
}

func each(format, separator string) func([]byte) [][]byte {
	return one(func(b []byte) string {
		var out strings.Builder
		for i, c := range b {
			if i > 0 {
				out.WriteString(separator)
			}
			fmt.Fprintf(&out, format, c)
		}
		return out.String()
	})
}

// aligned encodes groups of so many bytes as so many characters each: what is whole
// of b, at every place in a group that b can begin at.
func aligned(b []byte, group, chars int, encode func([]byte) string) (texts [][]byte) {
	for shift := range group {
		whole := b[min(len(b), (group-shift)%group):] // from the first group that is all b's
		whole = whole[:len(whole)/group*group]
		texts = append(texts, []byte(encode(whole))[:len(whole)/group*chars])
	}
	return texts
}

// words encodes words of so many bytes: what is whole of b, from every place in a
// word that b can begin at.
func words[T any](size int, read func([]byte) T, format, separator string) func([]byte) [][]byte {
	return func(b []byte) (texts [][]byte) {
		for shift := range size {
			var list []string
			for i := shift; i+size <= len(b); i += size {
				list = append(list, fmt.Sprintf(format, read(b[i:])))
			}
			texts = append(texts, []byte(strings.Join(list, separator)))
		}
		return texts
	}
}

func utf(put func([]byte, uint16) []byte) func([]byte) [][]byte {
	return func(b []byte) [][]byte {
		var out []byte
		for _, u := range utf16.Encode(bytes.Runes(b)) {
			out = put(out, u)
		}
		return [][]byte{out}
	}
}

// traceWords are values that stand in a function's arguments or in registers, as a
// Go program that crashes prints them: as numbers of the machine's word size. One
// is enough: what stands beside it is printed elsewhere, or not at all.
func traceWords(b []byte) (texts [][]byte) {
	for i := range 8 {
		texts = append(texts, fmt.Appendf(nil, "0x%016x", binary.LittleEndian.Uint64(b[i:])))
	}
	return texts
}
