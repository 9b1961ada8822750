package credential

import (
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"strings"
)

// Sum is the hash of what the order does: hex SHA-256 over its mode and its list, whatever the list's order. Hash holds what Sum
// was when the order was approved, so that an altered list is found, and a repeat can be told from another order.
func (i Incident) Sum() string {
	lines := []string{i.Mode}
	for _, id := range slices.Compact(slices.Sorted(slices.Values(i.Credentials))) {
		lines = append(lines, string(id))
	}
	sum := sha256.Sum256([]byte(strings.Join(lines, "\n")))
	return hex.EncodeToString(sum[:])
}
