package archtest

// row allows the packages that match Package to import those that match May. Paths are below the module; a pattern is
// a path, or one that ends in /* (everything below it) or /** (that too, and the package itself). ** alone is everything.
// The first row that matches a package counts. Every package may import what lies below itself.
type row struct {
	Package string
	May     []string
	// Only, where set, lists every module outside this one that may be linked into the package. Standard packages are free.
	Only []string
}

// table is ARCHITECTURE.md's, row by row. A new package of ours fails the test until it has a row: decide where it lives,
// in ARCHITECTURE.md first.
func table() []row {
	natsClient := []string{
		"github.com/nats-io/nats.go", "github.com/nats-io/nkeys", "github.com/nats-io/nuid", // the client itself
		"github.com/klauspost/compress", "golang.org/x/crypto", "golang.org/x/sys", "golang.org/x/text", // what it links
		"github.com/google/uuid",
	}
	uuidOnly := []string{"github.com/google/uuid"}
	return []row{
		{Package: "rotators", Only: uuidOnly},
		{Package: "rotators/rotatortest", May: []string{"rotators"}},
		{Package: "rotators/*", May: []string{"rotators"}},

		{Package: "events", May: []string{"rotators"}, Only: natsClient},
		{Package: "events/*", May: []string{"rotators", "events"}},

		{Package: "integration/store", May: []string{"rotators"}, Only: uuidOnly},
		{Package: "integration/store/storetest", May: []string{"rotators", "integration/store"}},
		{Package: "integration/store/*", May: []string{"rotators", "integration/store"}},
		{Package: "integration/**", May: []string{"rotators/**", "events/**", "integration/**", "internal/**", "scheduler", "workers"}},

		{Package: "internal/credential", May: []string{"rotators"}, Only: uuidOnly},
		{Package: "internal/ledger/ledgertest", May: []string{"internal/credential", "internal/ledger", "events"}},
		{Package: "internal/ledger/**", May: []string{"internal/credential", "internal/ledger", "events"}},
		{Package: "internal/config", May: []string{"internal/credential", "rotators"}},
		{Package: "internal/api", May: []string{"internal/**", "events", "rotators"}},
		{Package: "internal/testserver"},
		{Package: "internal/archtest"},

		{Package: "scheduler", May: []string{"internal/credential", "events"}},
		{Package: "workers", May: []string{"internal/credential", "rotators", "integration/store", "events"}},

		{Package: "cmd/rekey", May: []string{"**"}},
	}
}

// forTests are the packages that exist to test others: only tests and the composition root (for its demo) import them.
func forTests() []string {
	return []string{
		"rotators/rotatortest", "integration/store/storetest", "internal/ledger/ledgertest", "internal/testserver",
		"internal/archtest", "integration/e2e",
	}
}
