package archtest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// pkg is what `go list -deps -json` tells of one package.
type pkg struct {
	ImportPath   string
	Standard     bool
	DepOnly      bool
	Module       *struct{ Path string }
	Imports      []string
	Deps         []string
	TestImports  []string
	XTestImports []string
	Error        *struct{ Err string }
}

// list runs go list over the whole module that this test belongs to.
func list(t *testing.T) (module string, pkgs []pkg) {
	t.Helper()
	var root struct{ Path, Dir string }
	if err := json.Unmarshal(goCommand(t, "", "list", "-m", "-json"), &root); err != nil {
		t.Fatal(err)
	}
	touch(t, root.Dir)
	fields := "-json=ImportPath,Standard,DepOnly,Module,Imports,Deps,TestImports,XTestImports,Error"
	dec := json.NewDecoder(bytes.NewReader(goCommand(t, root.Dir, "list", "-e", "-deps", fields, "./...")))
	for {
		var p pkg
		err := dec.Decode(&p)
		if errors.Is(err, io.EOF) {
			return root.Path, pkgs
		}
		if err != nil {
			t.Fatal(err)
		}
		pkgs = append(pkgs, p)
	}
}

// touch lets this process look at every Go file's directory. `go test` reuses an earlier result unless something that the test
// itself opened has changed, and it does not see what go list opens.
func touch(t *testing.T, root string) {
	t.Helper()
	err := filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // another process tidied up
		}
		if err != nil {
			return err
		}
		if d.IsDir() && name != root && strings.HasPrefix(d.Name(), ".") {
			return filepath.SkipDir
		}
		if strings.HasSuffix(name, ".go") {
			_, _ = os.Stat(name)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func goCommand(t *testing.T, dir string, args ...string) []byte {
	t.Helper()
	cmd := exec.Command("go", args...)
	cmd.Dir = dir
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go %s: %v\n%s", strings.Join(args, " "), err, stderr.Bytes())
	}
	return out
}

// matches reports whether the path below the module matches the pattern; see row.
func matches(pattern, p string) bool {
	switch {
	case pattern == "**":
		return true
	case strings.HasSuffix(pattern, "/**"):
		base := strings.TrimSuffix(pattern, "/**")
		return p == base || strings.HasPrefix(p, base+"/")
	case strings.HasSuffix(pattern, "/*"):
		return strings.HasPrefix(p, strings.TrimSuffix(pattern, "*"))
	default:
		return p == pattern
	}
}

func matchesAny(patterns []string, p string) bool {
	return slices.ContainsFunc(patterns, func(pattern string) bool { return matches(pattern, p) })
}

// provider is the provider that a path belongs to, such as rotators/postgres, or "".
func provider(p string) string {
	for _, parent := range []string{"rotators/", "integration/store/"} {
		if rest, ok := strings.CutPrefix(p, parent); ok {
			name, _, _ := strings.Cut(rest, "/")
			if !matchesAny(forTests(), parent+name) {
				return parent + name
			}
		}
	}
	return ""
}

// violations lists everything that breaks the table, one line each.
func violations(module string, pkgs []pkg, rows []row) []string {
	var out []string
	bad := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	ours := func(importPath string) (string, bool) {
		if importPath == module {
			return ".", true
		}
		return strings.CutPrefix(importPath, module+"/")
	}
	modules := map[string]string{} // package outside this module -> its module
	for _, p := range pkgs {
		if p.Module != nil && p.Module.Path != module {
			modules[p.ImportPath] = p.Module.Path
		}
	}
	for _, p := range pkgs {
		name, ok := ours(p.ImportPath)
		if !ok {
			continue
		}
		if p.Error != nil {
			bad("%s: cannot be listed: %s", name, p.Error.Err)
			continue
		}
		i := slices.IndexFunc(rows, func(r row) bool { return matches(r.Package, name) })
		if i < 0 {
			bad("%s: has no row in the import table: decide in ARCHITECTURE.md where it lives, then add it", name)
			continue
		}
		r := rows[i]
		for _, imp := range p.Imports {
			to, ok := ours(imp)
			switch {
			case !ok || strings.HasPrefix(to, name+"/"):
			case matches("cmd/**", to):
				bad("%s imports %s: nobody imports cmd", name, to)
			case provider(name) != "" && provider(to) != "" && provider(name) != provider(to):
				bad("%s imports %s: a provider never imports a sibling", name, to)
			case provider(name) != "" && provider(name) == provider(to):
			case matchesAny(forTests(), to) && !matches("cmd/rekey", name) && !matchesAny(forTests(), name):
				bad("%s imports %s: it exists for tests", name, to)
			case !matchesAny(r.May, to):
				bad("%s imports %s: the table allows only %v", name, to, r.May)
			}
		}
		for _, imp := range slices.Concat(p.TestImports, p.XTestImports) {
			to, ok := ours(imp)
			switch {
			case !ok || to == name:
			case matches("cmd/**", to) && !matches("cmd/**", name):
				bad("%s imports %s in a test: nobody imports cmd", name, to)
			case provider(name) != "" && provider(to) != "" && provider(name) != provider(to):
				bad("%s imports %s in a test: a provider never imports a sibling", name, to)
			}
		}
		if r.Only == nil {
			continue
		}
		var foreign []string
		for _, dep := range p.Deps {
			if m := modules[dep]; m != "" && !slices.Contains(r.Only, m) && !slices.Contains(foreign, m) {
				foreign = append(foreign, m)
				bad("%s links %s: only %v may be behind it", name, m, r.Only)
			}
		}
	}
	return out
}

func TestImportTable(t *testing.T) {
	module, pkgs := list(t)
	checked := 0
	for _, p := range pkgs {
		if p.Module != nil && p.Module.Path == module {
			checked++
		}
	}
	if checked < 5 {
		t.Fatalf("go list showed only %d packages of %s: the test would prove nothing", checked, module)
	}
	for _, v := range violations(module, pkgs, table()) {
		t.Error(v)
	}
}

// TestImportTableFindsViolations plants one violation of each kind and wants it named.
func TestImportTableFindsViolations(t *testing.T) {
	const m = "example.com/m"
	outside := func(importPath, module string) pkg {
		return pkg{ImportPath: importPath, Module: &struct{ Path string }{module}}
	}
	mine := func(name string, imports ...string) pkg {
		p := outside(m+"/"+name, m)
		for _, i := range imports {
			p.Imports = append(p.Imports, m+"/"+i)
		}
		return p
	}
	testing1 := func(name string, imports ...string) pkg {
		p := mine(name, imports...)
		p.XTestImports, p.Imports = p.Imports, nil
		return p
	}
	linking := mine("events")
	linking.Deps = []string{"github.com/jackc/pgx/v5/pgconn", "github.com/nats-io/nats.go", "net"}
	broken := mine("workers")
	broken.Error = &struct{ Err string }{"no Go files"}

	for _, c := range []struct {
		name string
		pkgs []pkg
		want string // substring of the only violation; empty for none
	}{
		{"legal", []pkg{mine("workers", "internal/credential", "rotators", "events", "integration/store")}, ""},
		{"own sub-package", []pkg{mine("rotators/postgres", "rotators/postgres/scram"), mine("rotators/postgres/scram")}, ""},
		{"provider's sub-package", []pkg{mine("rotators/postgres/scram", "events")}, "rotators/postgres/scram imports events"},
		{"cmd may", []pkg{mine("cmd/rekey", "internal/testserver", "workers", "rotators/postgres")}, ""},
		{"a test may", []pkg{testing1("workers", "rotators/postgres", "internal/ledger/ledgertest")}, ""},
		{"upwards", []pkg{mine("internal/credential", "workers")}, "internal/credential imports workers"},
		{"config and provider", []pkg{mine("internal/config", "rotators/postgres")}, "internal/config imports rotators/postgres"},
		{"rotators and ours", []pkg{mine("rotators", "internal/credential")}, "rotators imports internal/credential"},
		{"testserver and ours", []pkg{mine("internal/testserver", "rotators")}, "internal/testserver imports rotators"},
		{"sibling", []pkg{mine("rotators/postgres", "rotators/mysql")}, "a provider never imports a sibling"},
		{"sibling in a test", []pkg{testing1("rotators/postgres", "rotators/mysql")}, "a provider never imports a sibling"},
		{"sibling store", []pkg{mine("integration/store/file", "integration/store/vaultkv")}, "a provider never imports a sibling"},
		{"cmd", []pkg{mine("internal/api", "cmd/rekey")}, "nobody imports cmd"},
		{"cmd in a test", []pkg{testing1("integration/e2e", "cmd/rekey")}, "nobody imports cmd"},
		{"for tests", []pkg{mine("internal/api", "internal/testserver")}, "it exists for tests"},
		{"unknown", []pkg{mine("internal/util")}, "internal/util: has no row"},
		{"root", []pkg{outside(m, m)}, ".: has no row"},
		{"third party", []pkg{linking, outside("github.com/jackc/pgx/v5/pgconn", "github.com/jackc/pgx/v5"), outside("github.com/nats-io/nats.go", "github.com/nats-io/nats.go")}, "events links github.com/jackc/pgx/v5"},
		{"broken", []pkg{broken}, "workers: cannot be listed: no Go files"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := violations(m, c.pkgs, table())
			switch {
			case c.want == "" && len(got) > 0:
				t.Errorf("legal imports refused: %q", got)
			case c.want != "" && (len(got) != 1 || !strings.Contains(got[0], c.want)):
				t.Errorf("got %q, want one with %q", got, c.want)
			}
		})
	}
}
