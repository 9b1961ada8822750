package credential

import (
	"fmt"
	"strings"
)

// Diagram is the plan table as a Mermaid state diagram. The README holds a copy, and a test compares them.
func Diagram() string {
	var b strings.Builder
	b.WriteString("stateDiagram-v2\n    [*] --> idle: declare\n    [*] --> adopting: declare, adopt\n    idle --> admitted: admit, rotate, replace\n")
	for _, u := range table {
		label := string(u.on)
		if u.when != "" {
			label += ", " + u.when
		}
		if u.plan != "" {
			label += " (" + string(u.plan) + ")"
		}
		fmt.Fprintf(&b, "    %s --> %s: %s\n", u.from, u.to, label)
	}
	b.WriteString("    note right of killing: kill leads here from every phase\n")
	return b.String()
}
