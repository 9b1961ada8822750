package config

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"unicode/utf8"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
)

// The limits of a file. They bound time and memory whatever the file holds.
const (
	MaxFileSize = 4 << 20 // bytes
	maxDepth    = 32      // nested mappings and lists
	maxNodes    = 500_000 // values, after aliases are expanded
	maxMarks    = 1000    // anchors, aliases and tags
	maxIndent   = 256     // columns before a line's first character
	maxWork     = 200e6   // sum of the squares of the block mappings' sizes, halved: one mapping of 20,000 keys
)

type position struct{ line, column int }

// node is one value of the file with where it stands. Exactly one of fields, items and value is in use, as form says.
type node struct {
	form   form
	key    position // of the key that names it; of the value itself in a list and at the root
	at     position // of the value
	value  any      // string, bool, json.Number or nil
	fields []field  // in the file's order, each name once
	items  []*node
}

type form int

const (
	scalar form = iota
	mapping
	list
)

type field struct {
	name string
	node *node
}

func (n *node) field(name string) *node {
	for _, f := range n.fields {
		if f.name == name {
			return f.node
		}
	}
	return nil
}

// find descends; ok is false, and the node the deepest that exists, if part of the path is missing.
func (n *node) find(path []string) (*node, bool) {
	for _, p := range path {
		var next *node
		if n.form == list {
			if i, err := strconv.Atoi(p); err == nil && i >= 0 && i < len(n.items) {
				next = n.items[i]
			}
		} else {
			next = n.field(p)
		}
		if next == nil {
			return n, false
		}
		n = next
	}
	return n, true
}

// generic is the node as encoding/json would decode it, numbers as json.Number.
func (n *node) generic() any {
	switch n.form {
	case mapping:
		m := make(map[string]any, len(n.fields))
		for _, f := range n.fields {
			m[f.name] = f.node.generic()
		}
		return m
	case list:
		s := make([]any, len(n.items))
		for i, item := range n.items {
			s[i] = item.generic()
		}
		return s
	default:
		return n.value
	}
}

// text is a scalar string's value, else "".
func (n *node) text() string {
	if n == nil {
		return ""
	}
	s, _ := n.value.(string)
	return s
}

// parseYAML reads one YAML document whose root is a mapping. It reports every problem that it can and returns nil if
// there is nothing to go on with.
func parseYAML(r *report, data []byte) *node {
	whole := position{}
	if len(data) > MaxFileSize {
		r.add(whole, nil, "", "the file has more than %d MiB", MaxFileSize>>20)
		return nil
	}
	if !utf8.Valid(data) {
		r.add(whole, nil, "save it as UTF-8", "the file is not UTF-8 text")
		return nil
	}
	data = slices.Clone(data)
	tokens := lexer.Tokenize(string(data))
	if !shallow(r, tokens) {
		return nil
	}
	file, err := parseTokens(tokens)
	if err != nil {
		pos, message := position{}, err.Error()
		var at yaml.Error
		if errors.As(err, &at) { // its own text would quote the source, which may hold a secret
			message = at.GetMessage()
			if t := at.GetToken(); t != nil && t.Position != nil {
				pos = position{t.Position.Line, t.Position.Column}
			}
		}
		r.add(pos, nil, "", "not valid YAML: %s", message)
		return nil
	}
	var body ast.Node
	for _, d := range file.Docs {
		if d.Body == nil {
			continue
		}
		if body != nil {
			r.add(positionOf(d.Body), nil, "keep one and remove the --- lines", "a second document; a configuration is one document")
			return nil
		}
		body = d.Body
	}
	if body == nil || body.Type() == ast.NullType {
		r.add(whole, nil, "`rekey init` writes a commented example", "the file is empty")
		return nil
	}
	w := walker{report: r, anchors: map[string]ast.Node{}, open: map[string]bool{}}
	root := w.walk(body, nil, 0)
	if root == nil || w.broken || w.exhausted {
		return nil
	}
	root.key = root.at
	if root.form != mapping {
		r.add(root.at, nil, "begin with version: 1", "want a mapping at the top, not %s", root.describe())
		return nil
	}
	return root
}

// parseTokens contains the parser: a panic in it is a problem of the file, not the end of the process.
func parseTokens(tokens token.Tokens) (f *ast.File, err error) {
	defer func() {
		if p := recover(); p != nil {
			f, err = nil, errors.New("the parser cannot make sense of it")
		}
	}()
	return parser.Parse(tokens, 0, parser.AllowDuplicateMapKey()) // duplicates are reported here, all of them
}

// shallow refuses, before the recursive parser sees them, files that nest without end.
func shallow(r *report, tokens token.Tokens) bool {
	flow, marks, line, inLine, work := 0, 0, 0, 0, 0
	var siblings [maxIndent + 1]int // lines so far at each column, since a line further left
	for _, t := range tokens {
		if t.Position == nil {
			continue
		}
		pos := position{t.Position.Line, t.Position.Column}
		if pos.line != line {
			line, inLine = pos.line, 0
			if pos.column > maxIndent {
				r.add(pos, nil, "", "indented by more than %d columns", maxIndent)
				return false
			}
			if t.Type != token.SequenceEntryType && t.Type != token.CommentType {
				clear(siblings[pos.column+1:])
				siblings[pos.column]++
				work += siblings[pos.column] // what the parser takes for a mapping grows with the square of its size
			}
		}
		switch t.Type {
		case token.MappingStartType, token.SequenceStartType:
			flow++
		case token.MappingEndType, token.SequenceEndType:
			flow--
		case token.SequenceEntryType, token.MappingKeyType:
			inLine++
		case token.AnchorType, token.AliasType, token.TagType:
			marks++
		}
		switch {
		case flow > maxDepth || inLine > maxDepth:
			r.add(pos, nil, "", "nested deeper than %d levels", maxDepth)
			return false
		case work > maxWork:
			r.add(pos, nil, "", "too many keys side by side: one mapping may have about 20000")
			return false
		case marks > maxMarks:
			r.add(pos, nil, "", "more than %d anchors, aliases and tags", maxMarks)
			return false
		}
	}
	return true
}

// walker turns the parser's tree into nodes. Aliases are expanded, within the limits.
type walker struct {
	report    *report
	anchors   map[string]ast.Node
	open      map[string]bool // aliases being expanded
	nodes     int
	exhausted bool // a limit is reached: stop
	broken    bool // the tree lacks something that was reported: do not judge what is there
}

func (w *walker) walk(n ast.Node, path pathed, depth int) *node {
	pos := positionOf(n)
	w.nodes++
	switch {
	case w.exhausted:
		return nil
	case depth > maxDepth:
		w.exhausted = true
		w.report.add(pos, nil, "", "nested deeper than %d levels", maxDepth)
		return nil
	case w.nodes > maxNodes:
		w.exhausted = true
		w.report.add(pos, nil, "", "more than %d values once aliases are expanded", maxNodes)
		return nil
	}
	out := &node{at: pos, key: pos}
	switch v := n.(type) {
	case *ast.NullNode:
	case *ast.StringNode:
		out.value = v.Value
	case *ast.LiteralNode:
		out.value = v.Value.Value
	case *ast.BoolNode:
		out.value = v.Value
	case *ast.IntegerNode:
		out.value = json.Number(fmt.Sprint(v.Value))
	case *ast.FloatNode:
		if math.IsInf(v.Value, 0) || math.IsNaN(v.Value) {
			out.value = v.GetToken().Value
		} else {
			out.value = json.Number(strconv.FormatFloat(v.Value, 'g', -1, 64))
		}
	case *ast.InfinityNode, *ast.NanNode:
		out.value = n.GetToken().Value
	case *ast.SequenceNode:
		out.form = list
		for i, item := range v.Values {
			if c := w.walk(item, append(slices.Clone(path), strconv.Itoa(i)), depth+1); c != nil {
				out.items = append(out.items, c)
			}
		}
	case *ast.MappingNode:
		out.form = mapping
		w.mapping(out, v.Values, path, depth)
	case *ast.MappingValueNode:
		out.form = mapping
		w.mapping(out, []*ast.MappingValueNode{v}, path, depth)
	case *ast.AnchorNode:
		if v.Name != nil && v.Value != nil {
			w.anchors[v.Name.GetToken().Value] = v.Value
			return w.walk(v.Value, path, depth)
		}
	case *ast.AliasNode:
		return w.alias(v, path, depth)
	case *ast.TagNode:
		w.report.add(pos, path, "remove it; quote a value that must be text", "YAML tags are not supported")
		if v.Value != nil {
			return w.walk(v.Value, path, depth+1)
		}
	default:
		w.broken = true
		w.report.add(pos, path, "", "a %s cannot stand here", n.Type().YAMLName())
		return nil
	}
	return out
}

func (w *walker) alias(v *ast.AliasNode, path pathed, depth int) *node {
	name := ""
	if v.Value != nil {
		name = v.Value.GetToken().Value
	}
	target, ok := w.anchors[name]
	if !ok || w.open[name] {
		w.broken = true
		w.report.add(positionOf(v), path, "", "alias *%s: there is no such anchor before it", clip(name))
		return nil
	}
	w.open[name] = true
	defer delete(w.open, name)
	return w.walk(target, path, depth+1)
}

func (w *walker) mapping(out *node, values []*ast.MappingValueNode, path pathed, depth int) {
	first := map[string]position{}
	var merged []field
	for _, mv := range values {
		if mv.Key == nil || mv.Value == nil {
			continue
		}
		pos := positionOf(mv.Key)
		if mv.Key.IsMergeKey() {
			if c := w.walk(mv.Value, path, depth+1); c != nil {
				merged = append(merged, w.merge(c, path)...)
			}
			continue
		}
		name, ok := keyName(mv.Key)
		if !ok {
			w.broken = true
			w.report.add(pos, path, "", "a key must be plain text")
			continue
		}
		at := append(slices.Clone(path), name)
		if earlier, ok := first[name]; ok {
			w.report.add(pos, at, "remove one of the two", "the key occurs twice, first at line %d", earlier.line)
			continue
		}
		first[name] = pos
		if c := w.walk(mv.Value, at, depth+1); c != nil {
			c.key = pos
			out.fields = append(out.fields, field{name, c})
		}
	}
	for _, f := range merged { // what the mapping says itself wins
		if out.field(f.name) == nil {
			out.fields = append(out.fields, f)
		}
	}
}

// merge lists the fields that `<<: *a` or `<<: [*a, *b]` brings; of equal names the first wins.
func (w *walker) merge(c *node, path pathed) []field {
	var fields []field
	sources := []*node{c}
	if c.form == list {
		sources = c.items
	}
	for _, s := range sources {
		if s.form != mapping {
			w.report.add(s.at, path, "", "<< wants a mapping")
			continue
		}
		fields = append(fields, s.fields...)
	}
	return fields
}

func keyName(k ast.MapKeyNode) (string, bool) {
	switch v := k.(type) {
	case *ast.StringNode:
		return v.Value, true
	case *ast.IntegerNode, *ast.BoolNode, *ast.FloatNode, *ast.NullNode:
		return k.GetToken().Value, true
	default:
		return "", false
	}
}

// positionOf is where a value begins: for a block mapping, its first key.
func positionOf(n ast.Node) position {
	switch v := n.(type) {
	case *ast.MappingNode:
		if !v.IsFlowStyle && len(v.Values) > 0 && v.Values[0].Key != nil {
			return positionOf(v.Values[0].Key)
		}
	case *ast.MappingValueNode:
		if v.Key != nil {
			return positionOf(v.Key)
		}
	}
	if t := n.GetToken(); t != nil && t.Position != nil {
		return position{t.Position.Line, t.Position.Column}
	}
	return position{}
}

func (n *node) describe() string {
	switch n.form {
	case mapping:
		return "a mapping"
	case list:
		return "a list"
	}
	switch n.value.(type) {
	case nil:
		return "an empty value"
	case bool:
		return "true or false"
	case json.Number:
		return "a number"
	default:
		return "text"
	}
}
