package config

import (
	"cmp"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// Problem is one thing wrong with a configuration file. It never holds a value that may be a secret.
type Problem struct {
	File string `json:"file"`
	// Line and Column count from 1; 0 where the problem is the file itself.
	Line   int `json:"line,omitempty"`
	Column int `json:"column,omitempty"`
	// Path is the field, such as credentials.orders/db.overlap.min.
	Path    string `json:"path,omitempty"`
	Message string `json:"message"`
	// Remedy says what to change or run; empty where the message says it.
	Remedy string `json:"remedy,omitempty"`
}

// String is file:line:column: path: message; fix: remedy.
func (p Problem) String() string {
	var b strings.Builder
	b.WriteString(p.File)
	if p.Line > 0 {
		fmt.Fprintf(&b, ":%d:%d", p.Line, p.Column)
	}
	if p.Path != "" {
		b.WriteString(": " + p.Path)
	}
	b.WriteString(": " + p.Message)
	if p.Remedy != "" {
		b.WriteString("; fix: " + p.Remedy)
	}
	return b.String()
}

// Problems is every problem of a file, in the file's order. It is the error type of [Load] and [Parse].
type Problems []Problem

// Error is one problem per line.
func (ps Problems) Error() string {
	lines := make([]string, len(ps))
	for i, p := range ps {
		lines[i] = p.String()
	}
	return strings.Join(lines, "\n")
}

// sorted returns the problems in the file's order, each once.
func (ps Problems) sorted() Problems {
	slices.SortStableFunc(ps, func(a, b Problem) int {
		return cmp.Or(a.Line-b.Line, a.Column-b.Column, strings.Compare(a.Path, b.Path), strings.Compare(a.Message, b.Message))
	})
	return slices.Compact(ps)
}

// report gathers the problems and warnings of one file.
type report struct {
	file     string
	problems Problems
	warnings Problems
}

// pathed is a path into the file: its elements, from the root.
type pathed []string

// String joins with dots; a list's index stands in brackets.
func (p pathed) String() string {
	var b strings.Builder
	for i, s := range p {
		switch {
		case isIndex(s):
			b.WriteString("[" + s + "]")
		case i == 0:
			b.WriteString(clip(s))
		default:
			b.WriteString("." + clip(s))
		}
	}
	return b.String()
}

func isIndex(s string) bool {
	return s != "" && strings.Trim(s, "0123456789") == ""
}

func (r *report) add(pos position, path pathed, remedy, format string, args ...any) {
	r.problems = append(r.problems, Problem{
		File: r.file, Line: pos.line, Column: pos.column, Path: path.String(), Message: fmt.Sprintf(format, args...), Remedy: remedy,
	})
}

// fieldInFront finds the field that a Validate method names at the start of its message: `overlap.min 1h: …`, `port: …`.
var fieldInFront = regexp.MustCompile(`^([a-z][a-z0-9_]*(?:[.\[][a-z0-9_\]]+)*)(:? )`)

// validated adds every problem that a Validate method found in what n holds. A message that begins with a field's name
// gets that field's position.
func (r *report) validated(n *node, path pathed, err error) {
	for _, e := range flatten(err) {
		at, where, message := n.key, path, e.Error()
		if m := fieldInFront.FindStringSubmatch(message); m != nil {
			field := strings.FieldsFunc(m[1], func(c rune) bool { return strings.ContainsRune(".[]", c) })
			if found, ok := n.find(field); ok {
				at, where, message = found.key, append(slices.Clone(path), field...), strings.TrimPrefix(message, m[0])
			}
		}
		r.add(at, where, "", "%s", message)
	}
}

// flatten lists the errors that were joined.
func flatten(err error) []error {
	if err == nil {
		return nil
	}
	var joined interface{ Unwrap() []error }
	if errors.As(err, &joined) {
		var out []error
		for _, e := range joined.Unwrap() {
			out = append(out, flatten(e)...)
		}
		return out
	}
	return []error{err}
}

// clip shortens what a user wrote, so that a message stays readable.
func clip(s string) string {
	if len(s) > 80 {
		return strings.ToValidUTF8(s[:80], "") + "…"
	}
	return s
}

// nearest is the candidate that s was probably meant to be, or "".
func nearest(s string, candidates []string) string {
	best, least := "", 3
	if len(s) <= 4 {
		least = 2
	}
	if len(s) > 64 {
		return ""
	}
	for _, c := range candidates {
		if d := distance(s, c); d < least {
			best, least = c, d
		}
	}
	return best
}

// distance counts the letters to insert, drop, change or swap with their neighbour.
func distance(a, b string) int {
	rows := make([][]int, len(a)+1)
	for i := range rows {
		rows[i] = make([]int, len(b)+1)
		rows[i][0] = i
	}
	for j := range rows[0] {
		rows[0][j] = j
	}
	for i := 1; i <= len(a); i++ {
		for j := 1; j <= len(b); j++ {
			change := 1
			if a[i-1] == b[j-1] {
				change = 0
			}
			rows[i][j] = min(rows[i-1][j]+1, rows[i][j-1]+1, rows[i-1][j-1]+change)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				rows[i][j] = min(rows[i][j], rows[i-2][j-2]+1)
			}
		}
	}
	return rows[len(a)][len(b)]
}
